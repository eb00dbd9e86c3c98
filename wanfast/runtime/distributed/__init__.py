"""This package connects ranks, shares work and weights among them, and exchanges tensors between them."""
