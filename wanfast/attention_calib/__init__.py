"""This package measures the errors of lossy attention, and chooses a density for each attention head.

The package imports the runtime, and the runtime never imports the package.
"""
