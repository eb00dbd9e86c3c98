"""The sampling loop: from noise to a clean latent, one expert and up to two guidance branches a step.

The loop knows no model: it asks `velocities(step's index, expert, branches, sample, timestep)`. Two experts share the
work by noise level: timesteps at or above the boundary belong to the high-noise expert, which lays out motion and
composition, the others to the low-noise one, which refines; each has its own guidance scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert
from wanfast.runtime.sampling.guidance import guide, needs_unconditional
from wanfast.runtime.sampling.scheduler import Integrator, Step, expert_of

VelocitiesFn = Callable[[int, Expert, Sequence[Branch], Tensor, int], list[Tensor]]  # one for each branch
StepFn = Callable[[int, Expert], None]  # (steps done, expert at work)


def denoise(
    noise: Tensor,
    steps: tuple[Step, ...],
    velocities: VelocitiesFn,
    *,
    boundary: float,
    guidance: Mapping[Expert, float],
    on_step: StepFn = lambda index, expert: None,
) -> Tensor:
    """The clean latent, float32, shaped as `noise`; `on_step(done, expert)` is called before and after each step."""
    integrator = Integrator(steps)
    sample = noise
    for index, step in enumerate(steps):
        expert = expert_of(step.timestep, boundary)
        on_step(index, expert)
        if needs_unconditional(guidance[expert]):
            both = velocities(index, expert, BRANCHES, sample, step.timestep)
            prediction = guide(both[0], both[1], guidance[expert])
        else:
            (prediction,) = velocities(index, expert, BRANCHES[:1], sample, step.timestep)
        sample = integrator.advance(sample, prediction)
        on_step(index + 1, expert)
    return sample
