"""This package calibrates plans of sparse attention. It uses the runtime, and the runtime never imports it."""
