"""Images and text in, video out. Torch-free."""
