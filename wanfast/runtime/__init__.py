"""This package holds what all commands share: options, facts, plans, models, sampling, the pipeline, processes."""
