"""Shows progress on stderr: the steps of videos, or the bytes of files.

A terminal gets bars, and a full bar stays on the screen. A pipe or a file gets a line every 30 s, so that a command
that ends sooner prints none.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

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

from wanfast.runtime.facts.memory import gb
from wanfast.runtime.planning.progress import ProgressFn, ResultFn, steps_left
from wanfast.runtime.store.json_files import Document

LINE_EVERY_S = 30.0

_ShowFn = Callable[[int, str, int, int, str], None]  # (job, stage, steps done, of all steps, text with its pace)


@contextmanager
def job_progress(names: Sequence[str], on_result: ResultFn) -> Iterator[tuple[ProgressFn, ResultFn]]:
    """Yields two functions that a run of jobs calls: one with the progress of a job, and one with its result.

    `names`: a name for each job. The second function calls `on_result`. After a job's result, its progress is ignored.
    """
    started: dict[int, tuple[float, int]] = {}  # time and step at which the pace of a job began to be measured
    last: dict[int, tuple[int, int, str]] = {}  # steps done, of all steps, text with the pace
    ended: set[int] = set()
    with _bars() if _on_terminal() else _lines(names, ended) as show:

        def on_progress(job: int, stage: str, done: int, total: int) -> None:
            if job not in ended:
                last[job] = done, total, _pace(started, job, stage, done, total)
                show(job, stage, *last[job])

        def on_end(job: int, result: Document) -> None:
            ended.add(job)
            if job in last:
                show(job, "failed" if "error" in result else "done", *last[job])
            on_result(job, result)

        yield on_progress, on_end


def _pace(started: dict[int, tuple[float, int]], job: int, stage: str, done: int, total: int) -> str:
    """Returns the seconds of a step and the time left, as soon as they are known; `started` is updated."""
    now = time.perf_counter()
    if not done:
        started.pop(job, None)  # each clip begins again
        return ""
    since, first = started.setdefault(job, (now, done))
    if done == first:
        return ""
    pace, left = (now - since) / (done - first), steps_left(stage, done, total)  # rich drops samples older than 30 s
    return f", {pace:.2f} s/step" + (f", {_clock(pace * left)} left" if left else "")


@contextmanager
def _bars() -> Iterator[_ShowFn]:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[int, TaskID] = {}

        def show(job: int, stage: str, done: int, total: int, pace: str) -> None:
            if job not in tasks:
                tasks[job] = bars.add_task(stage, total=total or None)
            bars.update(tasks[job], completed=done, total=total or None, description=stage + pace)

        yield show


@contextmanager
def _lines(names: Sequence[str], ended: set[int]) -> Iterator[_ShowFn]:
    """Prints lines about the jobs that are not in `ended`; of several jobs, a line also tells how many are done."""
    states: dict[int, str] = {}

    def show(job: int, stage: str, done: int, total: int, pace: str) -> None:
        states[job] = stage + (f", {done} of {total} steps" if total else "") + pace

    def line() -> str:
        running = [(job, state) for job, state in sorted(states.copy().items()) if job not in ended]
        if len(names) == 1 or not (running or ended):
            return "".join(state for _, state in running)
        return "; ".join([f"{len(ended)} of {len(names)} done", *(f"{names[job]}: {state}" for job, state in running)])

    with _printed(line):
        yield show


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function `progress(name, bytes done, total bytes)`, which shows how far each name is.

    A bar shows the bytes, the bytes per second, and the time left; the unit (kB, MB, GB) fits the size. A line shows
    the bytes of the newest name.
    """
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}
    newest = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal newest
        name = name.replace("_", " ")
        newest = f"{name}, {gb(done)} of {gb(total)}"
        if not _on_terminal():
            return
        if name not in tasks:
            bars.start()  # only now, because a display without bars leaves an empty line
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done)

    try:
        with nullcontext() if _on_terminal() else _printed(lambda: newest):
            yield progress
    finally:
        if tasks:
            bars.stop()


def _on_terminal() -> bool:
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


@contextmanager
def _printed(line: Callable[[], str]) -> Iterator[None]:
    """Prints the text that `line` returns every 30 s, from a thread; prints nothing if the text is empty."""
    started, ended = time.monotonic(), threading.Event()

    def run() -> None:
        while not ended.wait(LINE_EVERY_S):
            if text := line():
                with suppress(OSError):  # a full disk, or a pipe that nobody reads, ends no video
                    print(f"progress after {_clock(time.monotonic() - started)}: {text}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
