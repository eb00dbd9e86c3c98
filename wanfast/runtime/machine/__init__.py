"""What this machine shows: GPUs, memory, packages, signals. Torch-free."""
