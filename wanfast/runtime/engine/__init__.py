"""This package does the work of a rank: it loads models, encodes texts and the image, denoises, and decodes."""
