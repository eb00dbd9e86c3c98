"""This package holds the parent halves of the commands: options -> frozen config -> run -> print. Torch-free."""
