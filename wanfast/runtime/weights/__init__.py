"""From a file to a module on a device."""
