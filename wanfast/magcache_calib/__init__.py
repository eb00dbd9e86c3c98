"""Measures MagCache's curves: an offline tool on top of the runtime; the runtime does not depend on it."""
