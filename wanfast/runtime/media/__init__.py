"""This package reads images and prompts, and writes videos.

This package does not import torch.
"""
