"""This package holds what each command does in the parent: options -> frozen config -> run -> print.

This package does not import torch.
"""
