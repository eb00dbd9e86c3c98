"""Measures the quality of videos by metrics, and whether the tiny model's videos follow their prompts."""
