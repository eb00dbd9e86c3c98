"""This module is the part of `wanfast generate` that runs on ranks.

The ranks of a rank group make each video together, and the leader writes the video's .mp4 and .json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from wanfast.runtime.engine.session import Made, Session, Sessions
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.jobs.loop import ProgressFn, Result, run_jobs
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Job
from wanfast.runtime.planning.share import Share
from wanfast.runtime.store.artifacts import frames_file, writing_to
from wanfast.runtime.store.atomic import atomic_paths

FrameFileFn = Callable[[int], Path]

_FIRST_STAGE = ("drawing the noise", "encoding the image", "encoding the images")  # by the number of images


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    share: Share = Share(),
    progress: ProgressFn = lambda index, stage, done, total: None,
    folder: Path,
    first: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Makes the videos of `jobs`, and yields (index, result) of each job when it is done.

    Jobs that another rank group claims are left to that group. `folder` is the run folder. For a job without
    an output file, the frames are written into this folder, in a file with the number `first` + index.
    """
    work = partial(make_video, frames_of=lambda index: frames_file(folder, first + index))
    yield from run_jobs(work, jobs, sessions, share, progress)


def make_video(index: int, job: Job, session: Session, progress: ProgressFn, *, frames_of: FrameFileFn) -> Result:
    """Makes one video; the leader writes its .mp4 and .json.

    If the job has no output file, the leader writes the frames to the file `frames_of(index)` instead.
    """
    steps = job.config.video.num_steps
    progress(index, _FIRST_STAGE[len(job.config.video.images)], 0, steps)

    def on_step(done: int, expert: Expert) -> None:
        progress(index, expert.replace("_", " "), done, steps)

    output, fps = job.config.output, job.config.video.fps
    with sidecar.Recording(output.paths, fps, overwrite=output.overwrite) as recording:
        made = session.make(job, on_step, on_frames=recording.add)
        return session.ranks.lead(lambda: _write(made, recording, frames_of(index)))


def _write(made: Made, recording: sidecar.Recording, file: Path) -> Result:
    assert made.frames is not None
    plan, seconds = made.plan, made.facts["seconds"]
    document = sidecar.with_seconds(sidecar.planned(plan), made.facts, seconds)
    if plan.outputs:
        return recording.finish(made.frames, document)
    with writing_to(Path(plan.config.models.artifacts_dir)):
        file.parent.mkdir(exist_ok=True)
    with atomic_paths(file, option="--artifacts-dir", synced=False) as (unfinished,), unfinished.open("wb") as stream:
        np.save(stream, made.frames)
    return document | {"frames": str(file)}
