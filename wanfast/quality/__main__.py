"""`python -m wanfast.quality` measures the tiny model."""

from wanfast.quality.tiny import main

if __name__ == "__main__":
    main()
