"""This package sets up torch's device, measures its memory and time, and checks tensors for NaN and infinities."""
