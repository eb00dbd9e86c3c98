"""Measures how good a video is: metrics against a reference, and for the tiny model, whether the prompt is followed."""
