"""The worker half of `wanfast calibrate-magcache` denoises and measures each clip."""

from __future__ import annotations

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
    """Yields (index, measurements) of each clip as it is done."""
    yield from run_jobs(measure, jobs, sessions, share, progress)


def measure(index: int, job: Job, session: Session, progress: ProgressFn) -> dict[str, Any]:
    """Returns the ratios, spread and cosine distance of every step and branch of one clip."""
    plan, image = session.plan(job)
    steps = len(plan.schedule)
    recorder = Recorder(session.ranks, plan.geometry.tokens)

    def on_step(done: int, expert: Expert) -> None:
        progress(index, expert.replace("_", " "), done, steps)

    session.latent(plan, image, on_step, recorder)
    return {"steps": recorder.measured(steps), "seconds": round(session.watch.seconds["denoise"], 3)}
