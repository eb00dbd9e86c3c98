"""The sampling loop turns noise into a clean latent, with one expert and up to two guidance branches a step.

The loop has no models: it calls `velocities(step index, expert, branches, sample, timestep)`. The timestep decides
which expert runs. At or above the boundary it is the high-noise expert, which decides motion and composition. Below,
it is the low-noise expert, which refines details. Each expert has its own guidance scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert
from wanfast.runtime.sampling.guidance import guide, needs_unconditional
from wanfast.runtime.sampling.scheduler import Integrator, Step, expert_of

VelocitiesFn = Callable[[int, Expert, Sequence[Branch], Tensor, int], list[Tensor]]  # one velocity for each branch
StepFn = Callable[[int, Expert], None]  # (steps done, running expert)
SampleFn = Callable[[int, Expert, Tensor], None]  # (step index, expert, the sample that the step made)


def denoise(
    noise: Tensor,
    steps: tuple[Step, ...],
    velocities: VelocitiesFn,
    *,
    boundary: float,
    guidance: Mapping[Expert, float],
    on_step: StepFn = lambda index, expert: None,
    on_sample: SampleFn = lambda index, expert, sample: None,
) -> Tensor:
    """Denoises `noise` over all `steps`, and returns the clean latent in float32, with the shape of `noise`.

    Steps at or above `boundary` use the high-noise expert; `boundary` is a share of the 1000 training timesteps.
    `on_step(steps done, expert)` is called before and after each step. `on_sample(step index, expert, sample)` is
    called after each step, with the new sample.
    """
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
        on_sample(index, expert, sample)
        on_step(index + 1, expert)
    return sample
