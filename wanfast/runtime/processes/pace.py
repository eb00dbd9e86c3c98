"""Follows the progress of rank groups, and notices if a rank group hangs.

There are three cases:

* A group of one rank is in a denoising step, but not in the first step of a job. The group hangs if this step takes
  longer than --rank-timeout and longer than ten times the slowest earlier step of the job.
* A group of several ranks is in a denoising step, but not in the first step of a job. The group hangs if it is idle for
  longer than three times --rank-timeout and longer than ten times the slowest earlier step of the job.
* A group does anything else, such as loading models. The group hangs if it is idle for longer than three times
  --rank-timeout. On a GPU, it must also be idle for longer than 600 s.

In a group of several ranks, most hangs end earlier, because a rank waits for a peer only for --rank-timeout.

A group is idle if it neither reports progress nor works. A group works if one of its ranks on this machine works.
Before the first rank has started, the group works if its launcher works. A process works if it reads, writes or touches
new memory. A process on a CPU also works if it uses CPU time. On a GPU, CPU time does not count, because a host thread
uses CPU time even while it only waits for its GPU.

Three kinds of hangs are not found: an endless loop on a CPU; a process that reads, writes or touches memory for ever;
a launcher that stops after it has formed its rank group but before the first rank has started.
This module does not import torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.planning.progress import ProgressFn
from wanfast.runtime.processes.run_folder import PROGRESS, RANKS

_SLOWEST_STEPS = 10  # a step that takes longer than this many of the slowest one, and than --rank-timeout, hangs
_MOST_TIMEOUTS = 3.0  # a group that does nothing for this many of --rank-timeout, half an hour by default, hangs
# Of that limit, outside of steps whose time is known: a healthy rank may show no work during a long computation.
_LEAST_ON_GPU_S = 600.0
_LOOKS = 10  # at what a group does, in that time
# Of a core; a rank that uses less does not compute. A rank that waits in gloo uses 0.3 %; NCCL was not measured.
_LEAST_CPU = 0.01
_LEAST_CPU_S = 0.015  # likewise between two looks, because the kernel counts hundredths of a second


@dataclass(frozen=True)
class Work:
    """This class says how much a process has worked since its start, and when it last reported."""

    moved: int  # bytes that were read and written, and memory pages that were touched for the first time
    cpu_s: float
    reported_ns: int = 0  # the time of a rank's last report

    @classmethod
    def of(cls, pid: int, reports: Iterable[Path] = (), *, on_cpu: bool) -> Work:
        """Returns the work of process `pid` so far, from the counters of the operating system.

        `reports`: a rank's report files; the newest mtime is the time of the last report. CPU time counts only if
        `on_cpu` is true, because a rank that waits for its GPU also uses CPU time.
        """
        moved = ticks = 0
        with suppress(OSError):  # the process has ended
            fields = Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2].split()
            moved += int(fields[7]) + int(fields[9])  # minor and major page faults
            ticks += sum(map(int, fields[11:15]))  # of the process, and of its children that ended
            moved += sum(int(line.split()[1]) for line in Path("/proc", str(pid), "io").read_text().splitlines())
        reported_ns = max((file.stat().st_mtime_ns for file in reports if file.exists()), default=0)
        return cls(moved, ticks / os.sysconf("SC_CLK_TCK") if on_cpu else 0.0, reported_ns)

    def exceeds(self, before: Work, seconds: float) -> bool:
        """Returns whether the process worked or reported in the last `seconds`.

        `before`: the `Work` of the same process `seconds` ago. A little CPU time does not count as work, because a
        process that waits also uses some.
        """
        computed = self.cpu_s - before.cpu_s > max(_LEAST_CPU * seconds, _LEAST_CPU_S)
        return computed or self.moved > before.moved or self.reported_ns > before.reported_ns


Works = dict[int, Work]  # by process id


def works(run_folder: Path, number: int, launcher: int, *, on_cpu: bool) -> Works:
    """Returns {process id: its `Work`} for each rank of rank group `number` on this machine.

    If no rank of the group has started yet, returns {`launcher`: the launcher's `Work`}.
    `launcher`: the launcher's process id. `on_cpu`: whether the ranks compute on the CPU, so that CPU time counts.
    """
    pids = {int(file.read_text()): file for file in (run_folder / RANKS).glob(f"{number}-*/pid")}
    ranks = {pid: Work.of(pid, (file, file.with_name(PROGRESS)), on_cpu=on_cpu) for pid, file in pids.items()}
    # Beside ranks, the launcher does not count: it is always busy with watching them.
    return ranks or {launcher: Work.of(launcher, on_cpu=on_cpu)}


@dataclass
class Pace:
    """This class holds the last progress of a rank group, and the seconds that the group's steps take."""

    since: float  # when the last progress was seen, or when the group was first looked at
    state: dict[str, Any] | None = None  # None before the first progress
    written_ns: int = 0  # the time of the progress file
    idle_s: float = 0.0  # from `since` to the last look
    slowest_s: float = 0.0  # of the steps of this job
    works: Works = field(default_factory=dict)  # at the last look at what the group does
    looked: float = 0.0  # when that was
    active: float = 0.0  # when the group was last seen to work

    def look(self, state: dict[str, Any] | None, written_ns: int, now: float) -> bool:
        """Stores the progress that the rank group reports now, if any; returns whether this progress is new.

        `state`: the content of the progress file, or None. `written_ns`: the file's mtime in nanoseconds. `now`: the
        seconds of `time.monotonic`.
        """
        self.idle_s = now - self.since
        if state is None or (state, written_ns) == (self.state, self.written_ns):
            return False
        is_new = state != self.state
        if self.state is None or state["job"] != self.state["job"]:
            self.slowest_s = 0.0
        elif state["done"] > self.state["done"]:
            self.slowest_s = max(self.slowest_s, self.idle_s)
        self.state, self.written_ns, self.since, self.idle_s = state, written_ns, now, 0.0
        return is_new

    def hang(self, ranks: RanksConfig, work: Callable[[], Works], finished: Collection[int]) -> str | None:
        """Returns a message if the rank group hangs, else None.

        `ranks` holds --rank-timeout and the device. `work`: a function that returns the `Work` of each process of the
        group. `finished`: the numbers of the jobs that have a result.
        """
        state, timeout_s = self.state, ranks.rank_timeout
        least_s = 0.0 if ranks.device == "cpu" else _LEAST_ON_GPU_S
        if state is None or state["job"] in finished:
            where = "before its next report" if state else "before its first report"
        else:
            done, total, where = state["done"], state["total"], state["stage"]
            if 0 < done < total and self.slowest_s:
                least_s = _SLOWEST_STEPS * self.slowest_s
                if ranks.mesh.group_size == 1:
                    if self.idle_s <= max(timeout_s, least_s):
                        return None
                    limit = f"--rank-timeout {timeout_s:g} s and than {_SLOWEST_STEPS} times the slowest earlier step"
                    return f"hangs: step {done + 1} of {total} ({where}) takes longer than {limit}"
            where += f", {done} of {total} steps done" if total else ""
        limit_s = max(_MOST_TIMEOUTS * timeout_s, least_s)
        if self._rested_s(limit_s / _LOOKS, work) <= limit_s:
            return None
        times = f", {_MOST_TIMEOUTS:g} times --rank-timeout" if limit_s > least_s else ""
        return f"hangs ({where}): it did nothing for {limit_s:g} s{times}"

    def _rested_s(self, every_s: float, work: Callable[[], Works]) -> float:
        """Returns the seconds since the group reported progress or worked; calls `work` once in `every_s` seconds."""
        now = self.since + self.idle_s
        if now - self.looked >= every_s:
            found, seconds = work(), now - self.looked
            if any(new.exceeds(self.works.get(pid, Work(-1, 0.0)), seconds) for pid, new in found.items()):
                self.active = now
            self.works, self.looked = found, now
        return now - max(self.since, self.active)


def follow(
    run_folder: Path, numbers: Iterable[int], first: int, paces: dict[int, Pace], on_progress: ProgressFn
) -> None:
    """Reads the progress file of each rank group, updates `paces`, and calls `on_progress` if the progress is new.

    `numbers`: the numbers of the rank groups. `paces`: {number of a rank group: its `Pace`}; missing groups are added.
    A batch is a set of jobs that were sent together. `first`: the number of the first job of the running batch; job
    numbers count on from batch to batch. Progress of earlier batches is ignored. `on_progress` gets a job's index in
    the running batch, counted from 0.
    """
    for number in numbers:
        now, file = time.monotonic(), run_folder / PROGRESS / f"{number}.json"
        state, written_ns = None, 0
        if file.exists():
            written_ns, state = file.stat().st_mtime_ns, json.loads(file.read_text(encoding="utf-8"))
            state = state if state["job"] >= first else None
        if paces.setdefault(number, Pace(now)).look(state, written_ns, now) and state:
            on_progress(state["job"] - first, state["stage"], state["done"], state["total"])
