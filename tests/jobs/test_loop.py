"""Tests what the worker halves of several commands share: how they run jobs, and how they report steps."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import wanfast.attention_calib.calibrate as attention
import wanfast.magcache_calib.calibrate as magcache
from wanfast.runtime.jobs import generate, loop
from wanfast.runtime.planning.share import Share


@pytest.mark.parametrize("worker", [attention, magcache], ids=["attention", "magcache"])
def test_a_calibration_measures_each_job_of_its_share(monkeypatch: pytest.MonkeyPatch, worker: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(loop, "run_jobs", lambda *given: asked.append(given) or iter([(0, {"seconds": 1})]))
    share, jobs, sessions = Share(1, 2), [object()], object()
    assert list(worker.run(jobs, sessions, share=share, progress=print)) == [(0, {"seconds": 1})]
    assert asked == [(worker.measure, jobs, sessions, share, print)]
    assert inspect.signature(worker.run).parameters.keys() == inspect.signature(generate.run).parameters.keys()


def test_a_step_is_reported_with_the_name_of_its_expert() -> None:
    told: list[tuple[str, int, int]] = []
    loop.by_step(lambda *state: told.append(state), 4)(3, "high_noise")
    assert told == [("high noise", 3, 4)]
