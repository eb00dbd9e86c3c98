"""Everything below the command line: facts, geometry, models, sampling, the pipeline."""
