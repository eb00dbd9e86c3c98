"""This package defines model sizes, option values and the mesh of ranks, and computes shapes and memory. Torch-free."""
