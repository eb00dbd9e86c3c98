"""The worker halves of the commands, one module a verb."""
