"""This package holds the facts of models, meshes and options. Torch-free."""
