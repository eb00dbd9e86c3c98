"""This package loads weights from files into modules on a device."""
