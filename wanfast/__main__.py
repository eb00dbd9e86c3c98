"""`python -m wanfast` is the `wanfast` command."""

from wanfast.cli import main

if __name__ == "__main__":
    main()
