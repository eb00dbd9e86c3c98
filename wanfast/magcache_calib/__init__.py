"""Measures the curves that MagCache plans by: an offline tool on top of the runtime, which does not know of it."""
