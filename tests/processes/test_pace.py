"""Tests how the parent follows the steps of a rank group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanfast.runtime.processes.pace import Pace, follow


def state(done: int, job: int = 0) -> dict[str, Any]:
    return {"job": job, "stage": "low noise", "done": done, "total": 4}


def test_progress_is_reported_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "progress/0.json"
    file.parent.mkdir()
    told: list[tuple[int, str, int, int]] = []
    paces: dict[int, Pace] = {}
    for done in (1, 1, 2):
        file.write_text(json.dumps(state(done)))
        follow(tmp_path, [0], 0, paces, lambda *report: told.append(report))
    assert told == [(0, "low noise", 1, 4), (0, "low noise", 2, 4)]


def paced(*reports: tuple[float, int, int]) -> Pace:
    """Returns the pace after (second, steps done, job) of each look."""
    pace = Pace(state(0), 0, 0.0)
    for second, done, job in reports:
        pace.look(state(done, job), 0, second)
    return pace


def test_a_step_hangs_after_the_time_limit_and_ten_steps() -> None:
    assert paced((3, 1, 0), (32, 1, 0)).hang(10) is None  # less than ten steps of 3 s
    assert "step 2 of 4 (low noise)" in str(paced((3, 1, 0), (34, 1, 0)).hang(10))
    assert paced((3, 1, 0), (34, 1, 0)).hang(600) is None
    assert paced((3, 1, 0), (34, 2, 0), (100, 2, 0)).hang(10) is None  # the slowest step took 31 s


def test_a_rank_that_cannot_write_its_progress_does_not_hang() -> None:
    pace = paced((3, 1, 0))
    assert not pace.look(state(1), 5, 100)  # only the time of the file changed
    assert pace.hang(10) is None


def test_what_is_no_step_has_no_time_limit() -> None:
    assert paced((9999, 0, 0)).hang(10) is None  # loads, encodes, or compiles in the first step
    assert paced((1, 3, 0), (2, 4, 0), (9999, 4, 0)).hang(10) is None  # decodes and writes
    assert paced((1, 1, 0), (2, 0, 1), (9999, 0, 1)).hang(10) is None  # loads other models
    assert paced((1, 1, 0), (2, 1, 1), (9999, 1, 1)).hang(10) is None  # a job whose steps nobody has measured
