"""This package measures the speed and the quality of recipes over a set of clips, and writes a report."""
