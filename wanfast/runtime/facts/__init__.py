"""This package defines model sizes, option values and the mesh of ranks, and computes shapes and memory.

This package does not import torch.
"""
