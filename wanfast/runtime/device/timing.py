"""This module measures the seconds of named stages; it waits for a GPU to finish the work of a stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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


class FirstStep:
    """Measures the seconds of the first step, including compilation.

    Call the object before and after every step, with the number of finished steps. After the first step, calls do
    nothing.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._started = 0.0
        self.seconds = 0.0

    def __call__(self, done: int) -> None:
        if self.seconds == 0.0 and done <= 1:
            synchronize(self._device)
            if done == 0:
                self._started = time.perf_counter()
            else:
                self.seconds = time.perf_counter() - self._started


def synchronize(device: str) -> None:
    """Waits until all work that was queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
