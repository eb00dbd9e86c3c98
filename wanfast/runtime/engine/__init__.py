"""This package does the work of a rank with loaded models: it encodes texts and the image, denoises, and decodes."""
