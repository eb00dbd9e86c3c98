"""What lies on disk, and under which key. Torch-free."""
