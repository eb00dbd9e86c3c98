"""Tests what `benchmarks/whole_video.py` says of the steps of a video."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.results import program

STEP_S = [9.0, 2.0, 1.05, 1.0, 2.03, 2.0, 1.02, 1.0]  # the first one compiles


def made(**changes: Any) -> dict[str, Any]:
    """Returns the document of a video in which half of each expert's steps have guidance: ++--++--."""
    plan = {
        "steps": {"high_noise": 4, "low_noise": 4},
        "guidance": {"high_noise": 3.5, "low_noise": 3.5},
        "guidance_gate": 0.5,
        "clips": 1,
        "mesh": {"cfg": 2, "ulysses": 2},
        "unguided_mesh": {"cfg": 1, "ulysses": 4},
        "magcache": None,
    }
    return {"plan": plan | changes, "step_s": STEP_S * (changes.get("clips") or 1)}


def test_medians_leave_out_the_first_step_and_each_regrouping() -> None:
    assert program("whole_video").of_steps(made()) == {
        "guided_step_s": 2.0,
        "unguided_step_s": 1.0,
        "unguided_share": 0.5,
        "regrouping_s": [0.05, 0.03, 0.02],
    }


def test_ranks_that_stay_have_no_regrouping() -> None:
    found = program("whole_video").of_steps(made(unguided_mesh=None))
    assert "regrouping_s" not in found and found["unguided_share"] == pytest.approx(1.01 / 2.0)


def test_steps_that_skip_a_forward_do_not_count() -> None:
    skips = {name: [False] * 7 + [True] for name in ("skips_prompt", "skips_negative_prompt")}
    skips["skips_prompt"] = [False] * 5 + [True, False, True]
    found = program("whole_video").of_steps(made(unguided_mesh=None, magcache=skips, mesh={"cfg": 1, "ulysses": 4}))
    assert (found["guided_step_s"], found["unguided_step_s"]) == (pytest.approx(2.015), 1.02)


def test_a_figure_without_steps_is_missing() -> None:
    assert program("whole_video").of_steps(made(guidance_gate=1.0, unguided_mesh=None)) == {"guided_step_s": 1.05}


def test_clips_follow_each_other() -> None:
    found = program("whole_video").of_steps(made(clips=2))
    assert (found["guided_step_s"], len(found["regrouping_s"])) == (2.0, 7)
