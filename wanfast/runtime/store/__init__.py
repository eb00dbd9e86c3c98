"""This package finds and writes files on disk: weights, artifacts, curves, hashes. Torch-free."""
