"""Tests that one name of a class or of a type has one meaning in the whole package."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
OF_THE_ORIGINAL = {"Attention", "RMSNorm"}  # parts of several networks have the original's names


def defined(source: str) -> Iterator[str]:
    """Yields the public classes and aliases of types that a file defines; constants are in capitals."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_a_name_of_a_class_or_type_is_defined_once() -> None:
    places = defaultdict(list)
    for file in sorted((ROOT / "wanfast").rglob("*.py")):
        for name in defined(file.read_text(encoding="utf-8")):
            if re.match("[A-Z].*[a-z]", name) and name not in OF_THE_ORIGINAL:
                places[name].append(str(file.relative_to(ROOT)))
    assert len(places) > 100
    assert not {name: files for name, files in places.items() if len(files) > 1}
