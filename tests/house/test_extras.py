"""Tests that docs/extras.md lists the extras, and that pages and messages install them in one way only."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from wanfast.runtime.machine.packages import ATTENTION_PACKAGES, install

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted((ROOT / "wanfast").rglob("*.py"))
PACKAGES = re.compile(r"pip install ((?:--?[\w-]+ )*'?[^\s`'\"]+)")
# wanfast itself, torch for a CPU, and a client that no command of ours needs
WITHOUT_EXTRAS = (".", "torch", "--force-reinstall torch", "openai")


def test_the_page_lists_each_extra_once() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/extras.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(EXTRAS)


def unusual(text: str) -> list[str]:
    """Returns what a text installs in another way than `pip install 'wanfast[EXTRA]'`."""
    found = PACKAGES.findall(text)
    names = {name: re.fullmatch(r"'wanfast\[([\w,-]+)\]", name) for name in found if name not in WITHOUT_EXTRAS}
    return [name for name, match in names.items() if not match or not {*match[1].split(",")} <= {*EXTRAS}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_installs_extras_in_one_way(page: Path) -> None:
    assert unusual(page.read_text(encoding="utf-8")) == []


def test_messages_name_extras_by_one_function() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in CODE}
    own = texts.pop("packages.py")
    assert {name: found for name, text in texts.items() if (found := unusual(text))} == {}
    assert "wanfast[" not in "".join(texts.values()) and own.count("wanfast[") == 1
    used = re.findall(r"install\([\"']([\w-]+)[\"']\)", "".join(texts.values()))
    assert len(used) >= 10 and {*used, *(extra for _, _, extra in ATTENTION_PACKAGES.values())} <= {*EXTRAS}


def test_the_package_of_a_kernel_is_in_its_extra() -> None:
    for package, _, extra in ATTENTION_PACKAGES.values():
        assert [re.split("[<>=]", requirement)[0] for requirement in EXTRAS[extra]] == [package]


def test_other_ways_are_found() -> None:
    ways = "'.[fa3]'", "matplotlib", "'torchao>=0.18,<0.19'", "-c pins.txt -e '.[quantize]'", "'wanfast[nothing]'"
    assert all(unusual(f"`pip install {way}`") for way in ways) and unusual(f"run `{install('fa3')}`") == []
