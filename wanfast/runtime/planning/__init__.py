"""This package decides what will run, before anything starts.

This package does not import torch.
"""
