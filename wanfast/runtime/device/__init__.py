"""Torch's device: its setup, its memory, its clock."""
