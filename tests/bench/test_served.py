"""Tests the benchmark of the server's pauses: what it computes, and its smallest run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.results import program

served: Any = program("served")
TINY = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5")


def document(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: str) -> Any:
    monkeypatch.setattr(served, "end_by_signals", lambda: None)  # the test's own handlers stay
    monkeypatch.setattr(served, "set_environment", lambda: None)
    monkeypatch.setattr(sys, "argv", ["served.py", *options])
    served.main()
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_a_pause_leaves_out_decoding_and_encoding(tmp_path: Path) -> None:
    """Each line of the file is a stage, its begin and its end; a stage may have several spans."""
    spans = [
        ("text", 0, 1), ("encode", 1, 2), ("denoise", 2, 10), ("decode", 10.5, 12), ("decode", 12.5, 13),
        ("vae", 13, 14), ("encode", 14, 16), ("denoise", 16.25, 20), ("decode", 20, 21),
    ]  # fmt: skip
    marks = tmp_path / "marks"
    marks.write_text("".join(json.dumps(span) + "\n" for span in spans))
    old, new = served._videos_of(marks)
    assert served._pause(old, new) == 16.25 - 10 - 1.5 - 0.5 - 2


def test_a_server_of_the_tiny_model(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found = document(monkeypatch, capfd, *TINY, "--steps", "2", "--videos", "2", "--clients", "2")
    assert found["plan"]["forwards"] == 4 and len(found["alone"]) == 2 and len(found["pauses_s"]) == 1
    for row in found["alone"]:
        stages = row["stages"]
        assert row["wall_s"] > stages["total"] > stages["denoise"] > 0 and stages["write"] > 0
        assert row["beyond_denoising_s"] == pytest.approx(row["wall_s"] - stages["denoise"], abs=2e-3)
        assert row["beyond_stages_s"] == pytest.approx(row["wall_s"] - stages["total"], abs=2e-3)
    assert 0 < found["pause_s"]["largest"] < 10
    for row in found["first_byte_s"].values():
        assert row["of"] >= 2 and 0 < row["median"] <= row["largest"]
    assert found["commit"] and found["versions"] and found["hardware"]["cores"]


def test_a_server_that_cannot_start_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        document(monkeypatch, capfd, *TINY, "--host", "0.0.0.0")
    assert ended.value.code == 2 and "--api-key-file" in capfd.readouterr().err
