"""This package is the server: it takes jobs over HTTP, queues them in a database, and makes videos with one handle.

This package does not import torch.
"""
