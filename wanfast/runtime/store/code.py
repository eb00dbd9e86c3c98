"""Hashes the code that makes an artifact, because that code is one of the inputs of the artifact's key."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]


@functools.cache
def digest_of_code(*patterns: str) -> str:
    """Returns a digest of the files of this package that match `patterns`, such as "runtime/models/*.py"."""
    digest = hashlib.sha256()
    for pattern in patterns:
        files = sorted(_PACKAGE.glob(pattern))
        assert files, f"no file is named {pattern}"  # moved, and the key would miss it
        for file in files:
            digest.update(
                f"{file.relative_to(_PACKAGE).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes()
            )
    return digest.hexdigest()
