"""The mathematics of the loop: no weights, no files."""
