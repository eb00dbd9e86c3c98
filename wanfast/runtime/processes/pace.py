"""Follows the progress of rank groups, and notices a group that hangs in a step. Torch-free.

Only denoising steps after the first one are watched. They take about the same time, so the earlier steps show how long
a step takes. Loading, compiling, encoding, decoding and writing have no limit, because their time depends on the disk
and on the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.store.artifacts import PROGRESS

OnProgress = Callable[[int, str, int, int], None]  # (job, stage, steps done, of all steps)

_SLOWEST_STEPS = 10  # a step that takes longer than this many of the slowest one, and than --rank-timeout, hangs


@dataclass
class Pace:
    """This class holds the last progress of a rank group, and the seconds that its steps take."""

    state: dict[str, Any]
    written_ns: int  # the time of the progress file
    since: float  # when this was seen
    idle_s: float = 0.0  # from then to the last look
    slowest_s: float = 0.0  # of the steps of this job

    def look(self, state: dict[str, Any], written_ns: int, now: float) -> bool:
        """Stores the progress that the group reports now, and returns whether the progress is new."""
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

    def hang(self, timeout_s: float) -> str | None:
        """Returns a message if the current step takes too long, else None."""
        done, total = self.state["done"], self.state["total"]
        limit_s = max(timeout_s, _SLOWEST_STEPS * self.slowest_s)
        if not 0 < done < total or self.slowest_s == 0.0 or self.idle_s <= limit_s:
            return None
        step = f"step {done + 1} of {total} ({self.state['stage']})"
        return (
            f"hangs: {step} takes longer than --rank-timeout {timeout_s:g} s, and than {_SLOWEST_STEPS} earlier steps"
        )


def follow(
    run_folder: Path, numbers: Iterable[int], first: int, paces: dict[int, Pace], on_progress: OnProgress
) -> None:
    """Reads the progress of each rank group into `paces`, and calls `on_progress` for what is new.

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
