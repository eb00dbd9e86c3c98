"""How good a video is: metrics against a reference, and, for the tiny model, whether it does what the prompt says."""
