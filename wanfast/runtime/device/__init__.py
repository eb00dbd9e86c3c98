"""This package holds the setup, the memory, the clock and the numbers of torch's device."""
