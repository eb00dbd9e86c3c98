"""This package holds the processes of a run: the ranks, their launchers, and the parent that watches both."""
