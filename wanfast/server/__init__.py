"""This package is the server: jobs come over HTTP, wait in a database, and are made by one handle.

This package does not import torch.
"""
