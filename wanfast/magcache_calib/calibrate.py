"""The worker half of `wanfast calibrate-magcache`: the loop of a generation for each clip, measured, not decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wanfast.magcache_calib.recorder import Recorder
from wanfast.runtime.config import Branch, Expert
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.generate import Job, Loaded, ProgressFn, planned, run_with
from wanfast.runtime.pipeline import draw_noise
from wanfast.runtime.timing import Stopwatch


def run(
    jobs: list[Job],
    ranks: Ranks,
    *,
    claim: Callable[[int], bool] | None = None,
    progress: ProgressFn = lambda index, stage, done, total: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, measurements) of each clip as it comes."""
    yield from run_with(measure, jobs, ranks, claim, progress)


@torch.inference_mode()
def measure(
    index: int, job: Job, loaded: Loaded, text: dict[Branch, Tensor], watch: Stopwatch, progress: ProgressFn
) -> dict[str, Any]:
    """Ratios, spread and cosine distance of every step and branch of one clip."""
    pipeline, (plan, image) = loaded.pipeline, planned(job, loaded)
    steps = len(plan.schedule)
    recorder = Recorder(pipeline.ranks, plan.geometry.tokens)

    def on_step(done: int, expert: Expert) -> None:
        progress(index, expert.replace("_", " "), done, steps)

    noise = draw_noise(plan.config.seed, plan.geometry, pipeline.spec.dit.out_channels, plan.config.noise_device)
    condition = pipeline.encode_condition(image, plan.geometry)
    with watch.span("denoise"):
        pipeline.denoise(plan, noise.to(pipeline.device), condition, text, recorder, on_step)
    pipeline.experts.leave()
    return {"steps": recorder.measured(steps), "seconds": round(watch.seconds["denoise"], 3)}
