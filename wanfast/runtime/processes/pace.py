"""Follows the progress of rank groups, and notices if a rank group of one rank hangs. Torch-free.

Denoising steps after the first one take about the same time, so the earlier steps give a time limit for a later step.
The stages of loading, compiling, encoding, decoding and writing have no such limit. Their time depends on the disk, the
model and the size.
In these stages, a rank hangs if it neither reports progress nor works for a long time. The counters of the operating
system show whether a rank works: it reads, writes or touches new memory. On a CPU, CPU time counts as work too. On a
GPU, CPU time does not count, because a host thread uses CPU time even while it only waits for its GPU.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.store.artifacts import PROGRESS

OnProgress = Callable[[int, str, int, int], None]  # (job, stage, steps done, of all steps)

_SLOWEST_STEPS = 10  # a step that takes longer than this many of the slowest one, and than --rank-timeout, hangs
_MOST_TIMEOUTS = 3.0  # a rank that does nothing for this many of --rank-timeout, half an hour by default, hangs
_LOOKS = 10  # at what a rank does, in that time
_LEAST_CPU = 0.01  # of a core; a rank that uses less does not compute


@dataclass(frozen=True)
class Work:
    """This class counts what a rank did so far."""

    moved: int  # bytes that were read and written, and memory pages that were touched for the first time
    cpu_s: float

    @classmethod
    def of(cls, pids: Iterable[int], *, on_cpu: bool) -> Work:
        """Adds up the bytes that the processes `pids` read and wrote, and the pages that they touched first.

        Their CPU time counts only if `on_cpu` is true, because a rank that waits for its GPU also uses CPU time.
        """
        moved = ticks = 0
        for folder in (Path("/proc", str(pid)) for pid in pids):
            with suppress(OSError):  # the process has ended
                fields = folder.joinpath("stat").read_text().rpartition(") ")[2].split()
                moved += int(fields[7]) + int(fields[9])  # minor and major page faults
                ticks += sum(map(int, fields[11:15]))  # of the process, and of its children that ended
                moved += sum(int(line.split()[1]) for line in folder.joinpath("io").read_text().splitlines())
        return cls(moved, ticks / os.sysconf("SC_CLK_TCK") if on_cpu else 0.0)

    def exceeds(self, before: Work, seconds: float) -> bool:
        """Returns whether these counts show work beyond `before`, the counts of the same rank `seconds` earlier."""
        return self.moved > before.moved or self.cpu_s - before.cpu_s > _LEAST_CPU * seconds


@dataclass
class Pace:
    """This class holds the last progress of a rank group, and the seconds that the group's steps take."""

    state: dict[str, Any]
    written_ns: int  # the time of the progress file
    since: float  # when this was seen
    idle_s: float = 0.0  # from then to the last look
    slowest_s: float = 0.0  # of the steps of this job
    work: Work = Work(0, 0.0)  # at the last look at what the rank does
    looked: float = 0.0  # when that was
    active: float = 0.0  # when the rank was last seen to work

    def look(self, state: dict[str, Any], written_ns: int, now: float) -> bool:
        """Stores the progress that the rank group reports now, and returns whether the progress is new."""
        self.idle_s = now - self.since
        if (state, written_ns) == (self.state, self.written_ns):
            return False
        is_new = state != self.state
        if state["job"] != self.state["job"]:
            self.slowest_s = 0.0
        elif state["done"] > self.state["done"]:
            self.slowest_s = max(self.slowest_s, self.idle_s)
        self.state, self.written_ns, self.since, self.idle_s = state, written_ns, now, 0.0
        return is_new

    def hang(self, timeout_s: float, work: Callable[[], Work]) -> str | None:
        """Returns a message if the rank hangs, else None.

        `work`: a function that returns the counts of what the rank has done so far.
        """
        done, total, stage = self.state["done"], self.state["total"], self.state["stage"]
        if 0 < done < total and self.slowest_s:
            if self.idle_s <= max(timeout_s, _SLOWEST_STEPS * self.slowest_s):
                return None
            limit = f"--rank-timeout {timeout_s:g} s, and than {_SLOWEST_STEPS} earlier steps"
            return f"hangs: step {done + 1} of {total} ({stage}) takes longer than {limit}"
        limit_s = _MOST_TIMEOUTS * timeout_s
        if self._rested_s(limit_s / _LOOKS, work) <= limit_s:
            return None
        where = f"{stage}, {done} of {total} steps done" if total else stage
        return f"hangs ({where}): it did nothing for {limit_s:g} s, {_MOST_TIMEOUTS:g} times --rank-timeout"

    def _rested_s(self, every_s: float, work: Callable[[], Work]) -> float:
        """Returns the seconds since the rank reported progress or worked; calls `work` once in `every_s` seconds."""
        now = self.since + self.idle_s
        if now - self.looked >= every_s:
            found = work()
            if found.exceeds(self.work, now - self.looked):
                self.active = now
            self.work, self.looked = found, now
        return now - max(self.since, self.active)


def follow(
    run_folder: Path, numbers: Iterable[int], first: int, paces: dict[int, Pace], on_progress: OnProgress
) -> None:
    """Reads the progress of each rank group into `paces`, and calls `on_progress` for each new progress.

    Jobs before `first` are ignored, because they belong to earlier batches.
    """
    for number in numbers:
        now, file = time.monotonic(), run_folder / PROGRESS / f"{number}.json"
        if not file.exists():
            continue
        written_ns, state = file.stat().st_mtime_ns, json.loads(file.read_text(encoding="utf-8"))
        if state["job"] < first:
            continue
        is_new = number not in paces
        if paces.setdefault(number, Pace(state, written_ns, now)).look(state, written_ns, now) or is_new:
            on_progress(state["job"] - first, state["stage"], state["done"], state["total"])
