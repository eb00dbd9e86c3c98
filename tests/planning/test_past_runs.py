"""Tests the index of past runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from wanfast.runtime.planning import past_runs


def test_a_shortened_index_keeps_what_another_run_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends between the reading of the index and its replacement."""
    kept = dict.fromkeys((*past_runs._ALIKE, "attention", "machine"))
    monkeypatch.setattr(past_runs, "_MOST", 1)
    monkeypatch.setattr(past_runs, "_entry", lambda result: kept | {"seconds_a_forward": result["own"]})
    replace = past_runs.replace_text

    def record(own: float) -> None:
        past_runs.record(str(tmp_path), [{"own": own, "seconds": {"denoise": 2}, "first_step_s": 1}])

    def replace_late(*arguments: Any) -> None:
        monkeypatch.setattr(past_runs, "replace_text", replace)
        other.start()
        other.join(0.2)  # if it does not wait for this run, it ends now
        replace(*arguments)

    (tmp_path / "runs").mkdir()
    record(1.0)
    record(2.0)
    other = threading.Thread(target=record, args=(4.0,))
    monkeypatch.setattr(past_runs, "replace_text", replace_late)
    record(3.0)
    other.join()
    found = past_runs._entries(tmp_path / past_runs._INDEX)
    assert [entry["seconds_a_forward"] for entry in found] == [3.0, 4.0]
