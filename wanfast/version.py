"""Holds the version of this package; the JSON document of every video names this version."""

__version__ = "0.2.0"
