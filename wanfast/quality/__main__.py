"""Runs `python -m wanfast.quality`, which measures the tiny model."""

from wanfast.quality.tiny import main

if __name__ == "__main__":
    main()
