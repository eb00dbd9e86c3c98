"""What will run, decided before it starts. Torch-free."""
