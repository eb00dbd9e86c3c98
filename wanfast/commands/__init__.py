"""This package holds the part of each command that runs in the parent process.

Each command turns its options into a frozen config, runs this config, and prints the result.

No module of this package imports torch at module level.
"""
