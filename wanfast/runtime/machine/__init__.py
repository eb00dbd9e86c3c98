"""This package inspects the machine: GPUs, memory, packages, signals. Torch-free."""
