"""Hashes the code that makes an artifact, because that code is one of the inputs of the artifact's key.

Comments and docstrings change no result. So they are left out, and an artifact that took hours is still found after a
sentence was reworded.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
# Regular expressions, because a run waits for its keys: parsing the package takes 0.5 s, and these take 0.05 s.
_LONG = r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
_STRING_OR_COMMENT = re.compile(
    rf"""({_LONG}|{_LONG.replace('"', "'")}|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*')|\#[^\n]*""",
    re.DOTALL,
)
_LINE_END = re.compile(r"(?:[ \t]*\n)+")  # with the empty lines behind it
_DOCSTRING = re.compile(rf"(\A|:\n)[ \t]*r?{_LONG}\n", re.DOTALL)  # at the start of a file or of a block


@functools.cache
def digest_of_code(*patterns: str, words: bool = False) -> str:
    """Returns a digest of the Python files of this package that match `patterns`, such as "runtime/models/*.py".

    With `words`, comments and docstrings count too. Caches of compiled code need this, because they hold line numbers.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        files = sorted(_PACKAGE.glob(pattern))
        assert files, f"no file is named {pattern}"  # moved, and the key would miss it
        for file in files:
            text = file.read_text(encoding="utf-8")
            code = (text if words else without_words(text)).encode()
            digest.update(f"{file.relative_to(_PACKAGE).as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()


def without_words(source: str) -> str:
    """Returns Python source without its comments, docstrings and empty lines; all other lines keep their text."""
    code = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", source)
    return _DOCSTRING.sub(r"\1", _LINE_END.sub("\n", code.lstrip()))
