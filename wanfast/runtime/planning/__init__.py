"""This package decides what will run, before anything starts. Torch-free."""
