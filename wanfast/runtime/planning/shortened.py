"""Changes the options of a video so that it has fewer denoising steps, for a warm-up or a measurement.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from wanfast.runtime.config import Options, SkippingConfig, VideoConfig
from wanfast.runtime.config.option import options_of
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.curves import steps_of_video


def few_steps(video: Options, schedule: Options) -> dict[str, Any]:
    """Returns the options of `video`, changed so that the video has fewer steps and no MagCache.

    `schedule`: the options from `schedule_of`, which set the number of steps. MagCache is off, because its curve holds
    only for the original number of steps.
    """
    skipping = options_of(SkippingConfig)
    return {**{name: value for name, value in video.items() if name not in skipping}, **schedule, "magcache": "off"}


def few_lossy_steps(plan: Plan, steps: int = 1) -> dict[str, Any]:
    """Returns options that make a plan's attention lossy in a video of few steps too.

    The plan's own dense or bf16 steps may be more than these few steps. A plan of densities fits only the number of
    steps of its calibration. `steps`: the number of steps in float8, if the plan's attention is in float8.
    """
    if plan.sparsity:
        return {"dense_share": 0.0} | ({"density": plan.sparsity.density} if plan.densities else {})
    return {"fp8_steps": f"0:{steps}"} if plan.fp8 else {}


def schedule_of(video: VideoConfig, spec: ModelSpec, steps: int) -> dict[str, Any]:
    """Returns the options that reduce a video to `steps` steps.

    The result is {"steps": steps} if the video has no list of noise levels. If it has one, the result has two options:
    "sigmas" holds `steps` of these levels, spread evenly, and "switch_step" is the number of high-noise steps.
    """
    if video.levels is None:
        return {"steps": steps}
    last, experts = video.num_steps - 1, [expert for expert, _ in steps_of_video(video, spec.boundary)]
    chosen = [round(index * last / max(1, steps - 1)) for index in range(steps)]
    return {
        "sigmas": ",".join(f"{video.levels[index]:.9g}" for index in chosen),
        "switch_step": sum(experts[index] == "high_noise" for index in chosen),
    }


def least_steps(video: VideoConfig, spec: ModelSpec) -> int:
    """Returns the smallest number of steps that gives each expert of the video at least one step."""
    return next(steps for steps in range(1, video.num_steps + 1) if has_all_experts(video, spec, steps))


def has_all_experts(video: VideoConfig, spec: ModelSpec, steps: int) -> bool:
    """Returns whether each expert of a video still has a step if the video runs in only `steps` steps."""
    fewer = dataclasses.replace(video, **schedule_of(video, spec, steps))
    return _experts(fewer, spec) == _experts(video, spec)


def _experts(video: VideoConfig, spec: ModelSpec) -> set[str]:
    return {expert for expert, _ in steps_of_video(video, spec.boundary)}
