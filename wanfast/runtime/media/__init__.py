"""This package reads images and prompts, and writes videos. Torch-free."""
