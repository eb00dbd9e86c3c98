"""This package holds the processes of a run: the launcher, the ranks, and the parent that watches them."""
