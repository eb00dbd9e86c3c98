"""This module is the part of `wanfast generate` that runs on ranks.

The ranks of a rank group make each video together, and the leader writes the video's .mp4 and .json. A video may have
several clips. Each later clip starts from the last frame of the clip before, as the VAE decoded this frame. The first
clip may start from the last frame of an earlier video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wanfast.runtime.engine.pixels import Frame, Frames, FramesFn
from wanfast.runtime.engine.session import Made, Session, Sessions
from wanfast.runtime.jobs.loop import FrameFileFn, Result, by_step, run_jobs
from wanfast.runtime.media.earlier_video import earlier_frames
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Job, Plan
from wanfast.runtime.planning.progress import ProgressFn, StageFn, stage_of_clip
from wanfast.runtime.planning.share import Share
from wanfast.runtime.store.artifacts import writing_to
from wanfast.runtime.store.atomic import atomic_paths

_FIRST_STAGE = ("drawing the noise", "encoding the image", "encoding the images")  # by the number of images


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    share: Share = Share(),
    progress: ProgressFn = lambda index, stage, done, total: None,
    frames_of: FrameFileFn,
) -> Iterator[tuple[int, Result]]:
    """Makes the videos of `jobs`, and yields (index, result) of each job when it is done.

    Jobs that another rank group claims are left to that group. For a job without an output file, the frames are
    written into the file `frames_of(index)`.
    """
    yield from run_jobs(partial(make_video, frames_of=frames_of), jobs, sessions, share, progress)


def make_video(index: int, job: Job, session: Session, progress: ProgressFn, *, frames_of: FrameFileFn) -> Result:
    """Makes one video; the leader writes its .mp4 and .json.

    If the job has no output file, the leader writes the frames to the file `frames_of(index)` instead.
    """
    output, video = job.config.output, job.config.video
    with sidecar.Recording(output.paths, video.fps, overwrite=output.overwrite) as recording:
        joined = Joined(recording.add)
        if video.continue_from:
            session.ranks.lead(lambda: joined.add(earlier_frames(str(video.continue_from))))
        clips = job.clips()
        made = [
            _make_clip(clip, session, partial(progress, index), joined, partial(stage_of_clip, number, len(clips)))
            for number, clip in enumerate(clips, 1)
        ]
        return session.ranks.lead(lambda: _write(_plan_of(job, made), made, joined, recording, frames_of(index)))


def _make_clip(
    job: Job,
    session: Session,
    progress: StageFn,
    joined: Joined,
    stage_of: Callable[[str], str],
) -> Made:
    def report(stage: str, done: int, total: int) -> None:
        progress(stage_of(stage), done, total)

    steps = job.config.video.num_steps
    report(_FIRST_STAGE[len(job.config.video.images)], 0, steps)
    start = joined.begin_clip()
    return session.make(job, by_step(report, steps), on_frames=joined.add, start=start)


class Joined:
    """Joins the frames of clips on the leader. The frame that a clip shares with what comes before is left out."""

    def __init__(self, add: FramesFn) -> None:
        self._add = add
        self._pieces: list[Frames] = []
        self._is_shared = False  # whether the next frame repeats the last one

    def begin_clip(self) -> Frame | None:
        """Returns the frame from which the next clip starts.

        Returns None if no frame comes before this clip, and on all ranks except the leader.
        """
        self._is_shared = bool(self._pieces)
        return self._pieces[-1][-1] if self._pieces else None

    def add(self, frames: Frames) -> None:
        """Adds the next f frames [f, H, W, 3]; the caller must not change these frames later."""
        frames, self._is_shared = frames[int(self._is_shared) :], False
        if len(frames):
            self._pieces.append(frames)
            self._add(frames)

    def whole(self) -> Frames:
        """Returns all frames [F, H, W, 3]."""
        return np.concatenate(self._pieces)


def _plan_of(job: Job, made: list[Made]) -> Plan:
    """Returns the plan of the whole video, which is that of its first clip except for the prompts."""
    plan = made[0].plan
    return dataclasses.replace(plan, config=plan.config.replace(prompt=job.config.video.prompt))


def figures_of(made: list[Made]) -> dict[str, Any]:
    """Returns the figures of the whole video: sums of the clips' seconds, and the largest memory and errors."""
    figures, *_ = every = [clip.figures for clip in made]
    stages = dict.fromkeys(stage for each in every for stage in each["seconds"])
    checks = [each["attention_check"] for each in every if each["attention_check"]]
    peaks = zip(*(each["peak_memory_bytes_by_rank"] for each in every), strict=True)
    return figures | {
        "seconds": {stage: sum(each["seconds"].get(stage, 0.0) for each in every) for stage in stages},
        "attention_check": max(checks, key=lambda check: check["largest"] or 0.0, default=None),
        "compiled_anew": sum(each["compiled_anew"] for each in every),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in every),
        "peak_memory_bytes_by_rank": list(map(max, peaks)),
    }


def _write(plan: Plan, made: list[Made], joined: Joined, recording: sidecar.Recording, file: Path) -> Result:
    figures = figures_of(made)
    document = sidecar.with_seconds(sidecar.planned(plan), figures, figures["seconds"])
    frames = joined.whole() if plan.config.video.total_frames > plan.geometry.frames else made[0].frames
    assert frames is not None
    if plan.outputs:
        return recording.finish(frames, document)
    with writing_to(Path(plan.config.models.artifacts_dir)):
        file.parent.mkdir(exist_ok=True)
    with atomic_paths(file, option="--artifacts-dir", synced=False) as (unfinished,), unfinished.open("wb") as stream:
        np.save(stream, frames)
    return document | {"frames": str(file)}
