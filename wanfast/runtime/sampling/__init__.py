"""This package holds the mathematics of the sampling loop, without weights or files."""
