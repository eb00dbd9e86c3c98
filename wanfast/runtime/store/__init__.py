"""This package finds and writes files on disk: weights, artifacts, curves, hashes.

This package does not import torch.
"""
