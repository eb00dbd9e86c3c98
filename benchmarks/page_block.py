"""Replaces the part of a page that a program writes, and declares its figures for tests/house/test_docs.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def with_block(page: str, name: str, lines: list[str]) -> str:
    """Returns a page whose lines between `<!-- NAME: -->` and `<!-- end of NAME -->` are replaced."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no part between <!-- {name}: ... --> and <!-- end of {name} -->: restore it")
    return pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page)


def declaration(file: Path, figures: Mapping[str, str]) -> list[str]:
    """Returns the comment that declares {figure: its path in the file}, such as {"9.41 s": "ways/one/ms / 1000"}."""
    said = "; ".join(f"{figure} = {path}" for figure, path in figures.items())
    return [f"<!-- figures of {file}: {said} -->"] if figures else []
