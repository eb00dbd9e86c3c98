"""This package holds the part of each command that does its work, with one module for each command."""
