"""Follows the progress of rank groups, and notices a group that hangs in a step. Torch-free.

Only steps are watched, after the first one: they are alike, so the steps before show how long one takes. How long
loading, compiling, encoding, decoding and writing take depends on the disk and on the model, so these have no limit.
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
        """Notes what the group reports now, and returns whether it is new."""
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
        """Returns in words that a step lasts too long; None if no step does."""
        done, total = self.state["done"], self.state["total"]
        limit_s = max(timeout_s, _SLOWEST_STEPS * self.slowest_s)
        if not 0 < done < total or self.slowest_s == 0.0 or self.idle_s <= limit_s:
            return None
        step = f"step {done + 1} of {total} ({self.state['stage']})"
        return f"hangs: {step} takes longer than --rank-timeout {timeout_s:g} s, and than {_SLOWEST_STEPS} steps before"


def follow(
    run_folder: Path, numbers: Iterable[int], first: int, paces: dict[int, Pace], on_progress: OnProgress
) -> None:
    """Adds the progress of each group to `paces`, and reports what is new, for jobs from `first` on."""
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
