"""This package does the work of the commands; for example, module `generate` does the work of `wanfast generate`."""
