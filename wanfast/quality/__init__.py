"""Measures a video by metrics against a reference, and whether the tiny model's videos follow their prompts."""
