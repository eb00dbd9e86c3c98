"""Tests how the parent follows the steps of a rank group, and when a group hangs."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.configs import effective_config
from wanfast.runtime.processes import pace as paces_of_groups
from wanfast.runtime.processes.pace import Pace, Work, Works, follow, works

NOTHING: Works = {7: Work(1, 1.0)}  # what a rank did so far, at each look


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
    pace = Pace(0.0)
    pace.look(state(0), 0, 0.0)
    for second, done, job in reports:
        pace.look(state(done, job), 0, second)
    return pace


def hang(pace: Pace, work: Works = NOTHING, finished: tuple[int, ...] = (), **ranks: Any) -> str | None:
    config = effective_config(**{"device": "cpu", "rank_timeout": 10.0, **ranks}).ranks
    return pace.hang(config, lambda: work, finished)


def test_a_step_hangs_after_the_time_limit_and_ten_steps() -> None:
    assert hang(paced((3, 1, 0), (32, 1, 0))) is None  # less than ten steps of 3 s
    assert "step 2 of 4 (low noise)" in str(hang(paced((3, 1, 0), (34, 1, 0))))
    assert hang(paced((3, 1, 0), (34, 1, 0)), rank_timeout=600.0) is None
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
        assert hang(pace, {7: Work(next(moved) // 3, 0.0)}) is None  # it reads a slow disk, or compiles
    for second in range(3000, 3032):
        pace.look(last, 0, second)
        reason = hang(pace)
        assert (reason is not None) == (second > 3030), second
    assert "did nothing for 30 s, 3 times --rank-timeout" in str(reason)


GROUP = {"num_gpus": 2, "ulysses": 2}


def test_a_larger_group_hangs_if_none_of_its_ranks_works_in_a_step() -> None:
    """A rank that waits for a peer ends the group much earlier, and names the peer."""
    pace = paced((2, 1, 0))
    for second in range(3, 300, 3):
        pace.look(pace.state, 0, second)
        assert hang(pace, {7: Work(1, 1.0), 8: Work(second, 0.0)}, **GROUP) is None  # rank 1 works
    for second in range(300, 331):
        pace.look(pace.state, 0, second)
        reason = hang(pace, {7: Work(1, 1.0), 8: Work(1, 0.0)}, **GROUP)
        assert (reason is not None) == (second > 297 + 30), second
    assert str(reason) == "hangs (low noise, 1 of 4 steps done): it did nothing for 30 s, 3 times --rank-timeout"
    assert hang(paced((4, 1, 0), (43, 1, 0)), **GROUP) is None
    assert "nothing for 40 s" in str(rests(paced((4, 1, 0)), 45, **GROUP))  # ten steps


def rests(pace: Pace, until: int, **ranks: Any) -> str | None:
    """Looks at an idle group in each second until `until`; returns what the last look finds."""
    for second in range(int(pace.since), until + 1):
        pace.look(pace.state, pace.written_ns, second)
        reason = hang(pace, **ranks)
    return reason


def test_a_group_hangs_before_its_first_report_too() -> None:
    assert rests(Pace(0.0), 30) is None
    assert "hangs (before its first report): it did nothing for 30 s" in str(rests(Pace(0.0), 34))


def test_a_step_of_a_job_that_ended_has_no_limit() -> None:
    """As when a step's values were not finite: the group is already preparing the next job."""
    pace = paced((1, 1, 0), (20, 1, 0))
    assert hang(pace, finished=(0,)) is None and hang(pace) is not None


def test_on_a_gpu_the_limit_is_never_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paces_of_groups, "_LEAST_ON_GPU_S", 50.0)
    on_gpu = {"device": "cuda", "rank_timeout": 1.0}
    assert rests(paced((0, 0, 0)), 50, **on_gpu) is None  # two forwards in the first step
    assert str(rests(paced((0, 0, 0)), 56, **on_gpu)).endswith("it did nothing for 50 s")
    assert rests(paced((2, 1, 0)), 23, **on_gpu | GROUP) is not None  # the time of a step is known
    assert rests(paced((0, 0, 0)), 5, **on_gpu | {"device": "cpu"}) is not None


def test_ranks_that_only_poll_do_not_work_together() -> None:
    """Eight ranks that wait in gloo use 0.3 % of a core each, which the kernel counts in hundredths of a second."""
    pace, reason = Pace(0.0), None
    for look in range(350):
        pace.look(None, 0, look / 10)
        cpu_s = [int((0.003 * look / 10 + rank / 800) * 100) / 100 for rank in range(8)]
        reason = hang(pace, {rank: Work(1, used) for rank, used in enumerate(cpu_s)}, rank_timeout=1.0)
        if reason:
            break
    assert reason and look < 40


def test_the_launcher_counts_until_a_rank_has_started(tmp_path: Path) -> None:
    """Later it works all the time, because it looks after its ranks."""
    assert works(tmp_path, 0, os.getpid(), on_cpu=True).keys() == {os.getpid()}
    for rank in range(2):
        (tmp_path / f"ranks/0-{rank}").mkdir(parents=True)
        (tmp_path / f"ranks/0-{rank}/pid").write_text(str(os.getppid() + rank))
    assert works(tmp_path, 0, os.getpid(), on_cpu=True).keys() == {os.getppid(), os.getppid() + 1}


def test_the_kernel_tells_what_a_process_does() -> None:
    def work() -> Work:
        return Work.of(os.getpid(), on_cpu=True)

    before, ends = work(), time.process_time() + 0.1
    while time.process_time() < ends:
        pass
    assert work().cpu_s > before.cpu_s and Work.of(os.getpid(), on_cpu=False).cpu_s == 0
    before = work()
    with mmap.mmap(-1, 8 << 20) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory[:: mmap.PAGESIZE] = b"1" * (len(memory) // mmap.PAGESIZE)
    assert work().moved >= before.moved + 1000  # pages
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        time.sleep(0.1)  # it starts
        before = Work.of(sleeper.pid, on_cpu=True)
        time.sleep(0.1)
        assert not Work.of(sleeper.pid, on_cpu=True).exceeds(before, 0.1)
        sleeper.kill()
    assert Work.of(sleeper.pid, on_cpu=True) == Work(0, 0.0)  # it has ended


@pytest.mark.parametrize(("cpu_s", "works"), [(0.0, False), (0.5, False), (2.0, True)])
def test_a_rank_that_hardly_uses_a_core_does_not_compute(cpu_s: float, works: bool) -> None:
    assert Work(5, cpu_s).exceeds(Work(5, 0.0), 100) == works
