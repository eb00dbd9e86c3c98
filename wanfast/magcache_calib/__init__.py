"""This package measures MagCache's curves. It uses the runtime, and the runtime never imports this package."""
