from __future__ import annotations

import pytest
import torch

from wanfast.runtime.device import timing
from wanfast.runtime.device.timing import StepTimes, Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns a list whose last number is the time."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[-1])
    return now


def test_spans_of_one_name_add_up_also_when_one_raises(clock: list[float]) -> None:
    watch = Stopwatch("cpu")
    with watch.span("decode"):
        clock.append(2.0)
    with pytest.raises(ValueError), watch.span("decode"):
        clock.append(5.0)
        raise ValueError
    assert watch.seconds == {"decode": 5.0}


def run_steps(times: StepTimes, clock: list[float]) -> None:
    """Runs three steps of 4, 5 and 6 seconds, and calls the object as the loop does: before and after each step."""
    for index in range(3):
        times(index)
        clock.append(clock[-1] + 4.0 + index)
        times(index + 1)


def test_each_step_is_measured(clock: list[float]) -> None:
    times = StepTimes("cpu")
    assert times.seconds() == []
    run_steps(times, clock)
    assert times.seconds() == [4.0, 5.0, 6.0]


def test_only_the_first_step_waits_for_a_gpu(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments are events of the GPU; the end of the first step is waited for, and after the loop the last one."""
    waited: list[Event] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_s = clock[-1]

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            return (end.at_s - self.at_s) * 1000

    def refused() -> None:
        raise AssertionError("a step waits")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    times = StepTimes("cuda")
    run_steps(times, clock)
    assert [event.at_s for event in waited] == [4.0]
    assert times.seconds() == [4.0, 5.0, 6.0]
    assert [event.at_s for event in waited] == [4.0, 15.0]
