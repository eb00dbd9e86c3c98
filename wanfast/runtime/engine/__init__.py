"""What a rank does with loaded models: it encodes texts and the image, denoises, and decodes."""
