"""This package holds the setup, the memory and the clock of torch's device."""
