from __future__ import annotations

import pytest

from wanfast.runtime.device import timing
from wanfast.runtime.device.timing import FirstStep, Stopwatch


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


def test_only_the_first_step_is_measured(clock: list[float]) -> None:
    first = FirstStep("cpu")
    for done in range(3):
        first(done)
        clock.append(clock[-1] + 4.0 + done)
    assert first.seconds == 4.0
