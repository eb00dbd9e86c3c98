"""Hashes the code that makes an artifact, because that code is one of the inputs of the artifact's key.

Comments and docstrings change no result. So they are left out, and an artifact that took hours is still found after a
sentence was reworded.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]


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
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())) as docstring, *_]:
                    lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * _height(docstring)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def _height(node: ast.Expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1
