"""What a model, a mesh and an option are: facts and integers, torch-free."""
