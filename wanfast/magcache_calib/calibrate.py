"""Runs the jobs of `wanfast calibrate-magcache` on a rank: denoises each clip and measures its residuals."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from wanfast.magcache_calib.recorder import Recorder
from wanfast.runtime.engine.session import Session
from wanfast.runtime.jobs.loop import by_step, measuring
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.progress import ProgressFn


def measure(index: int, job: Job, session: Session, progress: ProgressFn) -> dict[str, Any]:
    """Denoises one clip without skips, and measures how its residuals change from step to step.

    Returns a dict: "steps" holds the result of `Recorder.measured`, "seconds" the seconds of denoising.
    """
    plan, images = session.plan(job)
    plan = dataclasses.replace(plan, may_regroup=False)  # because each token is compared with itself, on its rank
    steps = len(plan.schedule)
    recorder = Recorder(session.ranks, plan.geometry.tokens)

    session.latent(plan, images, by_step(partial(progress, index), steps), recorder)
    return {"steps": recorder.measured(steps), "seconds": round(session.watch.seconds["denoise"], 3)}


run = measuring(measure)
