"""Tests guidance that stops: in which steps the negative prompt runs, and what the later steps add, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wanfast.runtime.facts.choices import BRANCHES, Expert
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.sampling.guidance import Guidance, gate_steps, guide, guided_steps
from wanfast.runtime.store.curves import steps_of

EXPERTS: list[Expert] = [expert for expert, _ in steps_of("unipc", 40, 5.0, A14B.boundary)]
SCALES: dict[Expert, float] = {"high_noise": 3.5, "low_noise": 2.0}


@pytest.mark.parametrize(
    ("gate", "high", "low"), [(1.0, 15, 25), (0.7, 10, 18), (0.5, 8, 12), (0.3, 4, 8), (0.001, 1, 1)]
)
def test_a_gate_leaves_a_share_of_each_experts_steps(gate: float, high: int, low: int) -> None:
    guided = guided_steps(EXPERTS, SCALES, gate)
    assert guided == [True] * high + [False] * (15 - high) + [True] * low + [False] * (25 - low)


def test_a_half_gate_runs_60_of_80_forwards() -> None:
    assert sum(1 + both for both in guided_steps(EXPERTS, SCALES, 0.5)) == 60


def test_an_expert_without_guidance_has_no_gate() -> None:
    guided = guided_steps(EXPERTS, SCALES | {"low_noise": 1.0}, 0.5)
    assert guided == [True] * 8 + [False] * 32
    assert gate_steps(EXPERTS, guided) == [7, 8]
    assert gate_steps(EXPERTS, guided_steps(EXPERTS, SCALES, 0.5)) == [7, 8, 26, 27]
    assert gate_steps(EXPERTS, guided_steps(EXPERTS, SCALES)) == []


@pytest.mark.parametrize("low", [2.0, 1.0])
def test_later_steps_add_the_last_difference_of_their_own_expert(low: float) -> None:
    scales = SCALES | {"low_noise": low}
    guided = guided_steps(EXPERTS, scales, 0.5)
    guidance = Guidance(EXPERTS, scales, guided)
    generator = np.random.default_rng(3)
    differences: dict[Expert, Any] = {}
    for step, expert in enumerate(EXPERTS):
        prompt, negative = generator.standard_normal((2, 20))
        branches = guidance.branches(step)
        assert branches == (BRANCHES if guided[step] else BRANCHES[:1])
        got = guidance.combine(step, [prompt, negative][: len(branches)])
        if len(branches) == 2:
            differences[expert] = prompt - negative
        wanted = prompt + (scales[expert] - 1) * differences.get(expert, np.zeros(20))
        assert np.abs(got - wanted).max() < 1e-12, step


def test_without_a_gate_nothing_changes_and_nothing_is_stored() -> None:
    guidance = Guidance(EXPERTS, SCALES, guided_steps(EXPERTS, SCALES))
    prompt, negative = np.random.default_rng(3).standard_normal((2, 20)).astype(np.float32)
    for step, expert in enumerate(EXPERTS):
        assert np.array_equal(guidance.combine(step, [prompt, negative]), guide(prompt, negative, SCALES[expert]))
        assert guidance._differences == {}


def test_a_difference_never_goes_to_the_other_expert() -> None:
    """No plan asks for this: each expert with guidance has a guided step first."""
    experts: list[Expert] = ["high_noise", "high_noise", "low_noise"]
    guidance = Guidance(experts, SCALES, [True, False, False])
    guidance.combine(0, [np.ones(3), np.zeros(3)])
    assert guidance.combine(1, [np.ones(3)]).tolist() == [3.5] * 3
    assert guidance.combine(2, [np.ones(3)]).tolist() == [1] * 3
