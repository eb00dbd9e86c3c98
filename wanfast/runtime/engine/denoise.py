"""The sampling loop turns noise into a clean latent, with one expert and up to two guidance branches a step.

The loop has no models: it calls `velocities(step index, expert, branches, sample, timestep)`. The plan says which
expert runs in a step. The first steps run the high-noise expert, which decides motion and composition. The later steps
run the low-noise expert, which refines details. Each expert has its own guidance scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from wanfast.runtime.facts.choices import Branch, Expert
from wanfast.runtime.sampling.guidance import Guidance
from wanfast.runtime.sampling.scheduler import Integrator, Step

VelocitiesFn = Callable[[int, Expert, Sequence[Branch], Tensor, int], list[Tensor]]  # one velocity for each branch
StepFn = Callable[[int, Expert], None]  # (steps done, running expert)
SampleFn = Callable[[int, Expert, Tensor], None]  # (step index, expert, the sample that the step made)


def denoise(
    noise: Tensor,
    steps: tuple[Step, ...],
    experts: Sequence[Expert],
    velocities: VelocitiesFn,
    *,
    guidance: Guidance,
    fresh_noise: Callable[[], Tensor] | None = None,
    on_step: StepFn = lambda index, expert: None,
    on_sample: SampleFn = lambda index, expert, sample: None,
) -> Tensor:
    """Denoises `noise` over all `steps`, and returns the clean latent in float32, with the shape of `noise`.

    `experts`: the expert of each step. `velocities(step index, expert, branches, sample, timestep)` returns one
    velocity for each of `branches`. `fresh_noise` draws noise for the steps of a solver that adds noise.
    `on_step(steps done, expert of the step)` is called twice for each step i: before it with i, after it with i + 1.
    `on_sample(step index, expert, sample)` is called after each step, with the new sample.
    """
    integrator = Integrator(steps, fresh_noise)
    sample = noise
    for index, (step, expert) in enumerate(zip(steps, experts, strict=True)):
        on_step(index, expert)
        predictions = velocities(index, expert, guidance.branches(index), sample, step.timestep)
        sample = integrator.advance(sample, guidance.combine(index, predictions))
        on_sample(index, expert, sample)
        on_step(index + 1, expert)
    return sample
