"""Names the commit whose code made a result, so that a figure in a JSON file can be reproduced."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """Returns the short hash of HEAD, with "-dirty" if a tracked file outside benchmarks/results is changed.

    Without git or without a repository, returns the environment variable WANFAST_COMMIT, or None if it is not set.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():  # otherwise git might find the repository of another project
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
            return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return os.environ.get("WANFAST_COMMIT") or None
