"""Tests that docs/troubleshooting.md and the messages of the code are the same, in both directions.

A message is the text of an error that the code raises: the values in it are `…`, as in the rows of the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wanfast.runtime import errors

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
KINDS = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
NOTES = ("ignored",)  # an image is read in spite of these
FEWEST = 10  # letters of a message: a text with fewer is only a frame around another message
FEWEST_OF_ROW = 7


def raised(source: str) -> Iterator[tuple[int, int, str]]:
    """Yields (line, exit code, message) of each error that a file raises."""
    tree = ast.parse(source)
    known = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id in KINDS and call.args:
            yield call.lineno, KINDS[call.func.id], text(call.args[0], known)
        if call.func.id == "foreign" and len(call.args) > 1:
            kind = ast.unparse(call.args[2]) if len(call.args) > 2 else "ConfigError"
            message = f"{text(call.args[0], known)}: …: {text(call.args[1], known)}"
            yield call.lineno, KINDS.get(kind, 2), message


def text(node: ast.expr, known: dict[str, ast.expr]) -> str:
    """Returns the text of an expression, with `…` for what only a run knows."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left, known) + text(node.right, known)
    if isinstance(node, ast.Name) and isinstance(known.get(node.id), ast.Constant | ast.JoinedStr):
        return text(known[node.id], known)
    return "…"


MESSAGES = [
    (f"{path.relative_to(ROOT)}:{line}", code, message)
    for path in sorted((ROOT / "wanfast").rglob("*.py"))
    for line, code, message in raised(path.read_text(encoding="utf-8"))
    if not message.endswith(NOTES) and len(re.findall("[A-Za-z]", message)) >= FEWEST
]


def rows() -> Iterator[tuple[set[int], str]]:
    """Yields (exit codes, message) of each row of the page."""
    codes: set[int] = set()
    for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## Exit code"):
            codes = set(map(int, re.findall(r"\d+", line.partition(":")[0])))
        elif row := re.match(r"\| `error: ([^`]+)`", line):
            yield codes, row[1]


ROWS = list(rows())


def covers(row: str, message: str) -> bool:
    """Returns whether a row is about a message: the words of one of them stand, in their order, in the other."""
    return has_words(message, row) or has_words(row, message)


def has_words(whole: str, part: str) -> bool:
    pieces = [piece.strip() for piece in part.split("…")]
    return re.search(".*".join(map(re.escape, filter(None, pieces))), whole, re.DOTALL) is not None


@pytest.mark.parametrize(("place", "code", "message"), MESSAGES, ids=[place for place, _, _ in MESSAGES])
def test_each_message_has_a_row_under_its_exit_code(place: str, code: int, message: str) -> None:
    assert any(code in codes and covers(row, message) for codes, row in ROWS), f"exit code {code}: {message}"


def test_each_row_is_a_message_of_the_code_and_says_enough() -> None:
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "wanfast").rglob("*.py"))
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    known = "\n".join(text for text in texts if isinstance(text, str))
    for _, row in ROWS:
        parts = [part.strip(" :") for part in row.split("…") if len(part) > 3]
        assert [part for part in parts if part not in known] == []
        assert sum(len(re.findall("[A-Za-z]", part)) for part in parts) >= FEWEST_OF_ROW, row


def test_a_message_without_a_row_is_found() -> None:
    source = '_FIX = "copy it"\nraise ConfigError(f"{option} {file}: the moon is full: {_FIX}")\n'
    assert list(raised(source)) == [(2, 2, "… …: the moon is full: copy it")]
    assert not any(covers(row, "… …: the moon is full: copy it") for _, row in ROWS)
    assert covers("--size …: the moon is full: copy it", "… …: the moon is full: copy it")
