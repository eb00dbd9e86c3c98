"""This package inspects the machine: GPUs, memory, packages, signals.

This package does not import torch.
"""
