"""This package finds and writes the files on disk, under their keys. Torch-free."""
