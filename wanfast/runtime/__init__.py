"""This package holds everything below the command line: facts, geometry, models, sampling, the pipeline."""
