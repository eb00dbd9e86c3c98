"""This package holds the worker halves of the commands, one module for each verb."""
