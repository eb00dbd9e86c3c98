"""Tests that a gate for foreign code holds no code of ours, whose bugs it would report as the user's file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists()) / "wanfast"
GATED = sorted(path for path in PACKAGE.rglob("*.py") if "with foreign(" in path.read_text(encoding="utf-8"))


def own_calls(source: str) -> Iterator[str]:
    """Yields the calls of this package's functions that stand in the block of a gate."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("wanfast"):
            own |= {alias.asname or alias.name for alias in node.names}
    for gate in filter(is_gate, ast.walk(tree)):
        for call in ast.walk(ast.Module(gate.body, [])):
            if isinstance(call, ast.Call) and name_of(call.func) in own:
                yield f"{call.lineno}: {ast.unparse(call)}"


def is_gate(node: ast.AST) -> bool:
    calls = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    return any(isinstance(call, ast.Call) and name_of(call.func) == "foreign" for call in calls)


def name_of(function: ast.expr) -> str | None:
    """Returns the name of a function, or of a method of a reader or of `self`."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.attr if function.value.id in ("self", "reader") else None
    return function.id if isinstance(function, ast.Name) else None


@pytest.mark.parametrize("path", GATED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_gate_holds_only_foreign_calls(path: Path) -> None:
    assert list(own_calls(path.read_text(encoding="utf-8"))) == []


def test_the_rule_can_fail() -> None:
    source = "def own(): ...\nwith foreign('file', 'fix'):\n    json.loads(own())\n"
    assert list(own_calls(source)) == ["3: own()"]
