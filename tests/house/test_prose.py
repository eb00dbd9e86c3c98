"""Tests the mechanical part of the rules for prose in CONTRIBUTING.md: first lines of docstrings, and gone words."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CODE = sorted(path for folder in ("wanfast", "benchmarks", "training") for path in (ROOT / folder).rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")),
    *(ROOT / "docs").glob("*.md"),
]

# A word or phrase, and what says the same in the field's words.
GONE = {
    r"\bgangs?\b": "rank group",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bbut for\b": "except",
    r"\blet go of\b": "free",
    r"\bmak(e|es|ing) room\b": "evict",
    r"\bheld? against\b": "compare with",
    r"\bis told\b": "is reported",
    r"\bswapped\b": "offloaded",
}
PICTURES = ("Of", "Where", "What")  # a sentence does not begin so


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of the module, its classes and its public functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            public = isinstance(node, ast.Module) or not node.name.startswith("_")
            if public and (text := ast.get_docstring(node)):
                yield getattr(node, "lineno", 1), text


def is_sentence(first_line: str) -> bool:
    """Whether a first line can be a sentence: three words, a capital, an end, and not a picture's beginning."""
    words = first_line.split()
    begins = words[0][:1].isupper() or words[0][:1] in "`(["
    return begins and words[0] not in PICTURES and len(words) >= 3 and first_line.rstrip()[-1] in ".:"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_line_of_a_docstring_is_a_sentence(path: Path) -> None:
    wrong = [(line, first) for line, text in docstrings(path) if not is_sentence(first := text.split("\n\n")[0])]
    assert not wrong, "\n".join(f"{path.relative_to(ROOT)}:{line}: {first}" for line, first in wrong)


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_gone_words_are_gone(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for word, instead in GONE.items():
            assert not re.search(word, line, re.IGNORECASE), f"{path.name}:{number}: say {instead!r}: {line.strip()}"


def test_recipe_does_not_mean_a_scheme() -> None:
    """A recipe is a named set of options; only the keys of stored artifacts call a scheme so."""
    of_schemes = [f"wanfast/*{name}*.py" for name in ("quantiz", "builders", "checkpoint", "key_maps", "doctor")]
    found = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-niw", "recipe", "--", *of_schemes], capture_output=True, text=True
    ).stdout
    allowed = ('"recipe"', "inputs['recipe']", "--recipe", "recipe: Annotated", "_refuse_recipe")
    assert [line for line in found.splitlines() if not any(word in line for word in allowed)] == []


def test_the_server_calls_an_image_an_image() -> None:
    """All other commands say so too."""
    server, assets = ROOT / "wanfast/server", ROOT / "wanfast/assets/server"
    files = [ROOT / "docs/serve.md", *server.glob("*.py"), *assets.glob("*")]
    found = [
        (file.name, line.strip())
        for file in files
        for line in file.read_text().splitlines()
        if "picture" in line.lower()
    ]
    assert found == []


def test_the_rules_can_fail() -> None:
    assert is_sentence("Returns the plan of a request.") and is_sentence("`wanfast doctor`: shows what fits.")
    assert not any(map(is_sentence, ("Of one rank alone.", "Where it is kept.", "the plan of it.", "A plan")))
