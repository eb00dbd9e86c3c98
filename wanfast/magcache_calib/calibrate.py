"""Runs the jobs of `wanfast calibrate-magcache` on a rank: denoises each clip and measures its residuals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanfast.magcache_calib.recorder import Recorder
from wanfast.runtime.engine.session import Session, Sessions
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.jobs.loop import ProgressFn, run_jobs
from wanfast.runtime.planning.plan import Job
from wanfast.runtime.planning.share import Share


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    share: Share = Share(),
    progress: ProgressFn = lambda index, stage, done, total: None,
    folder: Path | None = None,
    first: int = 0,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index of the job, measurements of its clip) for each job, as soon as the clip is done."""
    yield from run_jobs(measure, jobs, sessions, share, progress)


def measure(index: int, job: Job, session: Session, progress: ProgressFn) -> dict[str, Any]:
    """Denoises one clip; returns its residuals' statistics for every step and branch, and the seconds of denoising."""
    plan, images = session.plan(job)
    plan = dataclasses.replace(plan, may_regroup=False)  # because each token is compared with itself, on its rank
    steps = len(plan.schedule)
    recorder = Recorder(session.ranks, plan.geometry.tokens)

    def on_step(done: int, expert: Expert) -> None:
        progress(index, expert.replace("_", " "), done, steps)

    session.latent(plan, images, on_step, recorder)
    return {"steps": recorder.measured(steps), "seconds": round(session.watch.seconds["denoise"], 3)}
