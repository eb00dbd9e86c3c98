"""The processes of a run: the launcher, the ranks, and how the parent watches them."""
