"""Types random options and values: every command line plans, or says in one line what is wrong; nothing is written."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.damage import counts, damage
from wanfast.cli import main
from wanfast.runtime.config import OPTIONS
from wanfast.runtime.config.option import OptionField

GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--device", "cpu", "--dry-run")
EDGES = ["0", "1", "-1", "2", "4", "5", "17", "80", "81", "4294967296", "9" * 30, "1e9", "0.5", "nan", "inf", "1e-9"]
MODES = ["none", "tiny", "a14b", "auto", "on", "off", "artifact", "preset", "E012K2R20", "E999K9R99"]
WORDS = [*MODES, "64x64", "1280*720", "16x16", "cat.png", "", " ", "~x", "/", "..", "a" * 300, "x.mp4", "a/b.mp4", "é"]


def values_of(option: OptionField) -> st.SearchStrategy[str]:
    """Returns the words that the option knows, numbers at edges, and any other text."""
    known = [str(choice) for choice in typing.get_args(option.asked) if isinstance(choice, str)]
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    return st.one_of(st.sampled_from([*known, *EDGES, *WORDS]), st.integers().map(str), st.floats().map(str), text)


def typed(name: str) -> st.SearchStrategy[tuple[str, ...]]:
    option = OPTIONS[name]
    if option.asked is bool or bool in typing.get_args(option.asked):
        return st.sampled_from([(option.flag,), (option.flag.replace("--", "--no-", 1),)])
    return values_of(option).map(lambda value: (option.flag, value))


OTHERS = st.sampled_from(
    [("--json",), ("--jobs", "cat.png"), ("--from", "cat.png"), ("--prompt-file", "cat.png"), ("--x",), ("x",)]
)
LINES = st.lists(st.one_of(st.sampled_from(list(OPTIONS)).flatmap(typed), OTHERS), min_size=1, max_size=4)


@counts(55)
def test_command_lines(workdir: Path, capsys: pytest.CaptureFixture[str], examples: int) -> None:
    def check(options: list[tuple[str, ...]]) -> None:
        before = sorted(workdir.rglob("*"))
        code, said = run([*GOOD, *(word for words in options for word in words)], capsys)
        assert code in (0, 2, 3, 4, 6), said
        assert "Traceback" not in said
        assert code in (0, 6) or said.count("error: ") == 1, said
        assert sorted(workdir.rglob("*")) == before

    damage(LINES, check, examples)


def run(arguments: list[str], capsys: Any) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("output", ["/", "."])
def test_an_output_without_a_name(workdir: Path, capsys: pytest.CaptureFixture[str], output: str, listed: bool) -> None:
    """Ten thousand command lines found this one."""
    (workdir / "jobs.jsonl").write_text("{}")
    code, said = run([*GOOD, "--output", output, *(["--jobs", "jobs.jsonl"] if listed else [])], capsys)
    assert code == 2 and f"--output {output}: names a folder" in said
