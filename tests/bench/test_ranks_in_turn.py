"""Tests how `benchmarks/ranks_in_turn.py` starts two checkouts and compares their steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench.results import ROOT, program


def test_checkouts_run_in_turn_and_give_a_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, str | None]] = []
    step_s = {"older": iter([[4.0, 4.2, 4.1], [4.4, 4.4, 4.4]]), ROOT.name: iter([[3.9, 3.9, 4.0], [4.3, 4.2, 4.3]])}

    def run(command: list[str], *, env: dict[str, str], **given: Any) -> Any:
        checkout = Path(env["PYTHONPATH"].split(":")[0])
        started.append((checkout.name, env.get("WANFAST_COMMIT")))
        assert "--nproc-per-node=4" in command and "--layers=7" in command and "--compile" in command
        facts = {"mesh": {"cfg": 2, "ulysses": 2}, "tokens": 45, "kernel": "fa3", "hardware": {}, "versions": {}}
        facts |= {"first_s": 9.0, "step_s": next(step_s[checkout.name]), "commit": f"of {checkout.name}"}
        return SimpleNamespace(stdout="a line\n" + json.dumps({**facts, "package": f"{checkout}/wanfast/__init__.py"}))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("WANFAST_COMMIT", "new")
    words = ["--checkout", str(tmp_path / "older"), "--checkout", str(ROOT), "--ranks", "4", "--turns", "2"]
    monkeypatch.setattr(sys, "argv", ["ranks_in_turn.py", *words, "--layers", "7"])
    program("ranks_in_turn").main()
    assert started == [("older", None), (ROOT.name, "new")] * 2  # the variable names the commit of this checkout
    document = json.loads(capsys.readouterr().out)
    older, newer = document["rows"]
    assert (older["checkout"], older["commit"], older["median_s"], older["spread_s"]) == ("older", "of older", 4.3, 0.4)
    assert newer["step_s"] == [3.9, 3.9, 4.0, 4.3, 4.2, 4.3] and newer["first_s"] == [9.0, 9.0]
    assert document["ratio"] == round(4.1 / 4.3, 4) and document["ratios"] == [round(3.9 / 4.1, 4), round(4.3 / 4.4, 4)]
    assert (document["commit"], document["mesh"]) == (f"of {ROOT.name}", {"cfg": 2, "ulysses": 2})


@pytest.mark.parametrize("words", [["--checkout", "."], ["--checkout", ".", "--checkout", ".", "--ranks", "3"]])
def test_what_cannot_be_compared_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ranks_in_turn.py", *words])
    with pytest.raises(SystemExit):
        program("ranks_in_turn").main()
    assert "give --checkout twice, and an even number of --ranks" in capsys.readouterr().err
