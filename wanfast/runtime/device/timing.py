"""This module measures how many seconds each named stage and each step of denoising takes, on a CPU or a GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds of each named stage."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to the stage `name`, even if the block raises an error."""
        synchronize(self._device)
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class StepTimes:
    """Measures the seconds of each step.

    Call the object with 0 before the first step, and with the number of finished steps after each step. The first
    step's seconds include compilation. On a GPU, only the call after the first step waits for the GPU; the other calls
    record CUDA events.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._moments: list[Any] = []  # the start of the first step, then the end of each step

    def __call__(self, done: int) -> None:
        """Notes the moment at which `done` steps are finished; a second call with the same number does nothing."""
        if done == len(self._moments):
            self._moments.append(_event() if self._device == "cuda" else _Moment())
            if done == 1:  # this step's report must not come early: the parent judges by it whether a later step hangs
                self._moments[1].synchronize()

    def seconds(self) -> list[float]:
        """Returns the seconds of each finished step; waits until the GPU has finished the last step."""
        for last in self._moments[-1:]:
            last.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(self._moments)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _Moment:
    """Replaces an event on a CPU, which has finished its work when a call returns."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        """Does nothing, because the work on a CPU has ended already."""

    def elapsed_time(self, end: _Moment) -> float:
        """Returns the milliseconds from this moment to `end`."""
        return (end._at_s - self._at_s) * 1000


def synchronize(device: str) -> None:
    """Waits until all work that was queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
