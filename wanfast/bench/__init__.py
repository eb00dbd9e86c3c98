"""This package measures recipes over a set of clips, speed and quality side by side, and writes a report."""
