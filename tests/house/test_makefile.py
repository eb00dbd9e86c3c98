"""Tests the targets of the Makefile that lead from nothing to a video: each prints the wanfast line that it runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from wanfast.cli import app

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
JOURNEY = ("download", "quantize", "calibrate", "warmup", "generate", "bench", "doctor")


def make(bin_folder: Path, *arguments: str) -> str:
    """Runs make without setting up an environment; the programs are those of a folder. Returns what it printed."""
    words = ["make", "--no-print-directory", "-o", ".venv/runtime", "-o", ".venv/dev", f"BIN={bin_folder}", *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("MODEL", "SCHEME", "MAKEFLAGS")}
    return subprocess.run(words, cwd=ROOT, env=clean, capture_output=True, text=True, check=True, timeout=60).stdout


def wanfast_lines(printed: str) -> list[list[str]]:
    """Returns the words of the lines that start wanfast."""
    split = [shlex.split(line) for line in printed.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in split if words and words[0] == "BIN/wanfast"]


@pytest.mark.parametrize("model", ["tiny", "a14b", "t2v-a14b"])
@pytest.mark.parametrize("target", JOURNEY[1:])
def test_each_target_of_the_journey_prints_one_line_that_wanfast_takes(target: str, model: str) -> None:
    (words,) = wanfast_lines(make(Path("BIN"), "-n", target, *([] if model == "tiny" else [f"MODEL={model}"])))
    name, *arguments = words
    assert name == {"calibrate": "calibrate-magcache"}.get(target, target)
    assert arguments[arguments.index("--model") + 1] == model
    if "--jobs" in arguments:
        examples = arguments[arguments.index("--jobs") + 1]
        assert ("image" in (ROOT / examples).read_text()) == (model != "t2v-a14b")
    assert ("--device" in arguments) == (model == "tiny" and target != "doctor")  # doctor shows all devices
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_options_reach_the_line() -> None:
    (words,) = wanfast_lines(make(Path("BIN"), "-n", "generate", "OPTIONS=--steps 8"))
    assert words[-2:] == ["--steps", "8"]


def test_the_published_weights_are_fetched_only_if_they_are_named() -> None:
    for model in ("a14b", "t2v-a14b"):
        assert wanfast_lines(make(Path("BIN"), "-n", "download", f"MODEL={model}")) == [["download", "--model", model]]
    for other in ([], ["MODEL=tiny"], ["MODEL=a-folder"]):
        assert wanfast_lines(make(Path("BIN"), "-n", "download", *other)) == []
    assert "Nothing to download for MODEL=tiny" in make(Path("BIN"), "download")


def test_git_ignores_what_the_targets_and_commands_write() -> None:
    bench = next(option for option in typer.main.get_command(app).commands["bench"].params if option.name == "output")  # type: ignore[attr-defined]
    for folder in (str(bench.default), "out", "artifacts"):
        assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/a file"], cwd=ROOT).returncode == 0, folder


def test_a_target_shows_its_line_and_runs_it(tmp_path: Path) -> None:
    program = tmp_path / "wanfast"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m wanfast "$@"\n')
    program.chmod(0o755)
    first, *rest = make(tmp_path, "doctor", f"OPTIONS=--artifacts-dir {tmp_path}").splitlines()
    assert first == f"{program} doctor --model tiny --artifacts-dir {tmp_path}"
    assert any("this model runs on a CPU" in line for line in rest)
