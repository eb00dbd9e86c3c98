"""Classifier-free guidance moves the prediction for the prompt away from the prediction for the negative prompt.

Source: Ho & Salimans (arXiv 2207.12598) eq. 6 with scale = 1 + w; at scale 1 the negative prompt has no effect.

A gate stops the negative prompt's branch after a given share of an expert's steps. Let D be the difference of the two
predictions in the expert's last step with both branches. Each later step of this expert adds (scale - 1) D to the
prediction for the prompt. So the guidance goes on in the last known direction, and each of these steps runs one forward
instead of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wanfast.runtime.facts.choices import BRANCHES, EXPERTS, Branch, Expert


def guide(conditional: Any, unconditional: Any, scale: float) -> Any:
    """Returns unconditional + scale (conditional - unconditional), elementwise."""
    return unconditional + scale * (conditional - unconditional)


def needs_unconditional(scale: float) -> bool:
    """Returns whether the negative prompt's branch must run: False at scale 1, which saves half of the forwards."""
    return scale != 1.0


def guided_steps(experts: Sequence[Expert], scales: Mapping[Expert, float], gate: float = 1.0) -> list[bool]:
    """Returns for each step whether the negative prompt's branch runs.

    The branch runs in the first steps of each expert, and not in the expert's later steps. `gate` (0 to 1) is the share
    of the expert's steps in which the branch runs; the number of these steps is rounded, and at least 1. If the scale
    of an expert is 1, the branch runs in none of the expert's steps.
    `experts`: the expert of each step. `scales`: the guidance scale of each expert.
    """
    left = {
        expert: max(1, round(gate * experts.count(expert))) if needs_unconditional(scales[expert]) else 0
        for expert in EXPERTS
    }
    guided = []
    for expert in experts:
        guided.append(left[expert] > 0)
        left[expert] -= 1
    return guided


def gate_steps(experts: Sequence[Expert], guided: Sequence[bool]) -> list[int]:
    """Returns the steps before and after each early stop of guidance; steps count from 0.

    A stop is early if the next step has the same expert, but no guidance. For each early stop, the list holds two
    numbers: the last step with guidance, and the next step.
    `experts`: the expert of each step. `guided`: for each step, whether it has guidance.
    """
    return [
        step
        for after in range(1, len(guided))
        if guided[after - 1] and not guided[after] and experts[after - 1] == experts[after]
        for step in (after - 1, after)
    ]


class Guidance:
    """Applies guidance to one video.

    The guidance of an expert may stop early. Then this class stores the difference D of the two branches' predictions,
    from the expert's last step with both branches. The later steps of this expert run only the prompt's branch, and
    reuse D.
    """

    def __init__(self, experts: Sequence[Expert], scales: Mapping[Expert, float], guided: Sequence[bool]) -> None:
        self._experts, self._scales, self._guided = experts, scales, guided
        self._needed_after = {step for step in gate_steps(experts, guided) if guided[step]}
        self._differences: dict[Expert, Any] = {}

    def branches(self, step: int) -> tuple[Branch, ...]:
        """Returns the branches that run in a step, which counts from 0: the prompt's branch stands first."""
        return BRANCHES if self._guided[step] else BRANCHES[:1]

    def combine(self, step: int, velocities: Sequence[Any]) -> Any:
        """Returns the guided velocity of a step.

        `velocities`: the predictions of the branches in `branches(step)`, in the same order.
        """
        expert, scale = self._experts[step], self._scales[self._experts[step]]
        prompt, *negative = velocities
        if negative:
            if step in self._needed_after:
                self._differences = {expert: prompt - negative[0]}  # that of the other expert is freed
            return guide(prompt, negative[0], scale)
        if expert not in self._differences:
            return prompt
        return prompt + (scale - 1) * self._differences[expert]
