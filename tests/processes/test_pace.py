"""Tests how the parent follows the steps of a rank group."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from wanfast.runtime.processes.pace import Pace, Work, follow

NOTHING = Work(1, 1.0)  # that a rank did so far, at each look


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


def hang(pace: Pace, timeout_s: float = 10) -> str | None:
    return pace.hang(timeout_s, lambda: NOTHING)


def test_a_step_hangs_after_the_time_limit_and_ten_steps() -> None:
    assert hang(paced((3, 1, 0), (32, 1, 0))) is None  # less than ten steps of 3 s
    assert "step 2 of 4 (low noise)" in str(hang(paced((3, 1, 0), (34, 1, 0))))
    assert hang(paced((3, 1, 0), (34, 1, 0)), timeout_s=600) is None
    assert hang(paced((3, 1, 0), (34, 2, 0), (100, 2, 0))) is None  # the slowest step took 31 s


def test_a_rank_that_cannot_write_its_progress_does_not_hang() -> None:
    pace = paced((3, 1, 0))
    assert not pace.look(state(1), 5, 100)  # only the time of the file changed
    assert hang(pace) is None


OTHER_STAGES = {
    "loads, encodes, or compiles in the first step": [(1, 0, 0)],
    "decodes and writes": [(1, 3, 0), (2, 4, 0)],
    "loads other models": [(1, 1, 0), (2, 0, 1)],
    "a job whose steps nobody has measured": [(1, 1, 0), (2, 1, 1)],
}


@pytest.mark.parametrize("stage", OTHER_STAGES)
def test_what_is_no_step_may_take_any_time_while_the_rank_works(stage: str) -> None:
    pace = paced(*OTHER_STAGES[stage])
    last, moved = pace.state, itertools.count(3)
    for second in range(2, 3000, 10):
        pace.look(last, 0, second)
        assert pace.hang(10, lambda: Work(next(moved) // 3, 0.0)) is None  # it reads a slow disk, or compiles
    for second in range(3000, 3032):
        pace.look(last, 0, second)
        reason = pace.hang(10, lambda: NOTHING)
        assert (reason is not None) == (second > 3030), second
    assert "did nothing for 30 s, 3 times --rank-timeout" in str(reason)


def test_the_kernel_tells_what_a_process_does() -> None:
    def work() -> Work:
        return Work.of([os.getpid()], on_cpu=True)

    before, ends = work(), time.process_time() + 0.1
    while time.process_time() < ends:
        pass
    assert work().cpu_s > before.cpu_s and Work.of([os.getpid()], on_cpu=False).cpu_s == 0
    before = work()
    bytearray(8 << 20)
    assert work().moved >= before.moved + 1000  # pages
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        time.sleep(0.1)  # it starts
        before = Work.of([sleeper.pid], on_cpu=True)
        time.sleep(0.1)
        assert not Work.of([sleeper.pid], on_cpu=True).exceeds(before, 0.1)
        sleeper.kill()
    assert Work.of([sleeper.pid], on_cpu=True) == Work(0, 0.0)  # it has ended


@pytest.mark.parametrize(("cpu_s", "works"), [(0.0, False), (0.5, False), (2.0, True)])
def test_a_rank_that_hardly_uses_a_core_does_not_compute(cpu_s: float, works: bool) -> None:
    assert Work(5, cpu_s).exceeds(Work(5, 0.0), 100) == works
