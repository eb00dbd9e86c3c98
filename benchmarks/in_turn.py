"""Times ways in turn, so that the GPU's clock, which drops under load, affects them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from wanfast.runtime.device.timing import synchronize


def medians(ways: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Returns the median seconds of each way, with the device synchronised, after a first round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            synchronize(device)
            started = time.perf_counter()
            way()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
