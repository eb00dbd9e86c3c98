"""wanfast: the fastest trustworthy way to run Wan2.2-I2V-A14B (image + prompt -> video)."""

__version__ = "0.1.0"
