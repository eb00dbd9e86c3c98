"""Shows progress bars on stderr: the steps of a video, or the bytes of files. A full bar stays on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from wanfast.runtime.planning.progress import ProgressFn, steps_left


@contextmanager
def progress_bars(*, enabled: bool) -> Iterator[ProgressFn]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bars:
        tasks: dict[int, TaskID] = {}
        started: dict[int, tuple[float, int]] = {}  # time and step at which the pace of a job began to be measured

        def on_progress(job: int, stage: str, done: int, total: int) -> None:
            now = time.perf_counter()
            if job not in tasks:
                tasks[job] = bars.add_task(stage, total=total or None)
            known = ""
            if not done:
                started.pop(job, None)  # each clip begins again
            else:
                since, first = started.setdefault(job, (now, done))
                pace = (now - since) / max(done - first, 1)  # rich drops samples older than 30 s
                known = (
                    f", {pace:.2f} s/step, {_clock(pace * steps_left(stage, done, total))} left" if done > first else ""
                )
            bars.update(tasks[job], completed=done, total=total or None, description=f"{stage}{known}")

        yield on_progress


@contextmanager
def byte_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function `progress(name, bytes done, total bytes)`, which shows one bar for each name.

    A bar shows the bytes, the bytes per second, and the time left; the unit (kB, MB, GB) fits the size.
    """
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in tasks:
            bars.start()  # only now, because a display without bars leaves an empty line
            tasks[name] = bars.add_task(name.replace("_", " "), total=total)
        bars.update(tasks[name], completed=done)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
