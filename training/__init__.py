"""Trains the tiny model. Imports the package; the package never imports it."""
