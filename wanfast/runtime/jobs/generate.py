"""This module is the part of `wanfast generate` that runs on ranks.

The ranks of a rank group make each video together, and the leader writes the video's .mp4 and .json. A video may have
several clips. Each later clip starts from the last decoded frame of the clip before. The first clip may start from the
last frame of an earlier video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wanfast.runtime.engine.pixels import Frame, Frames
from wanfast.runtime.engine.session import Made, Session, Sessions, Sources
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.jobs.loop import FinishFn, FrameFileFn, Result, by_step, run_jobs
from wanfast.runtime.media.earlier_video import earlier_frames
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.plan import Plan
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
) -> Iterator[tuple[int, Result | FinishFn]]:
    """Makes the videos of the jobs that this rank group claims; yields (index of the job, result or `finish`) for each.

    If there is one job, or if the rank group spans several machines, yields the result when the video's files are
    complete. Otherwise, yields a function `finish` as soon as the video's frames are decoded, so that the files are
    completed while the next video is made. The leader must call `finish()` once, in any thread: it completes the files,
    and returns the result or raises WanFastError. If a job fails before its frames are decoded, yields the error as the
    job's result.
    `share`: decides which jobs this rank group claims. `frames_of`: a function that returns, for the index of a job
    without an output file, the file for the job's frames.
    """
    # x264 holds back half of the frames until it has got the last one; on several machines, each needs the result
    is_list = len(jobs) > 1 and jobs[0].config.ranks.nnodes == 1
    work = partial(make_video, frames_of=frames_of, finishes_later=is_list)
    yield from run_jobs(work, jobs, sessions, share, progress)


def make_video(
    index: int,
    job: Job,
    session: Session,
    progress: ProgressFn,
    *,
    frames_of: FrameFileFn,
    finishes_later: bool = False,
) -> Result | FinishFn:
    """Makes one video; the leader writes its .mp4 and .json.

    If the job has no output file, the leader writes the frames to the file `frames_of(index)` instead. Returns the
    result when the files are complete. If `finishes_later` is true, returns as soon as the frames are decoded: the
    leader must then call the returned function, which completes the files and returns the result.
    """
    with ExitStack() as opened:
        recording = _recording(job, frames_of(index))
        opened.enter_context(recording)
        joined = Joined(recording.add)
        if earlier := job.config.video.continue_from:  # decoded again for its image, because all frames fill memory
            session.ranks.lead(lambda: joined.begin_with(earlier_frames(earlier)))
        clips, sources = job.clips(), Sources()
        made = [
            _make_clip(
                clip, session, partial(progress, index), joined, sources, partial(stage_of_clip, number, len(clips))
            )
            for number, clip in enumerate(clips, 1)
        ]
        if finishes_later:
            return partial(_finish, opened.pop_all(), recording, job, made)
        result: Result = session.ranks.lead(lambda: recording.finish(_document(_plan_of(job, made), made)))
        return result


def _finish(opened: ExitStack, recording: sidecar.Recording | FramesFile, job: Job, made: list[Made]) -> Result:
    """Completes the files of a video, and returns the result. Closes `opened`, which holds the files."""
    with opened:
        return recording.finish(_document(_plan_of(job, made), made))


def _recording(job: Job, frames: Path) -> sidecar.Recording | FramesFile:
    output, video = job.config.output, job.config.video
    if output.paths:
        return sidecar.Recording(output.paths, video.fps, video.total_frames, overwrite=output.overwrite)
    return FramesFile(frames, video.total_frames, Path(job.config.models.artifacts_dir))


def _make_clip(
    job: Job,
    session: Session,
    progress: StageFn,
    joined: Joined,
    sources: Sources,
    stage_of: Callable[[str], str],
) -> Made:
    def report(stage: str, done: int, total: int) -> None:
        progress(stage_of(stage), done, total)

    steps = job.config.video.num_steps
    report(_FIRST_STAGE[len(job.config.video.images)], 0, steps)
    start = joined.begin_clip()
    made = session.make(
        job, by_step(report, steps, then="decoding"), on_frames=joined.add, start=start, sources=sources
    )
    return dataclasses.replace(made, frames=None)  # they are written already


class Joined:
    """Joins the frames of a video's clips on the leader.

    The last frame of a clip is the first frame of the next clip. This shared frame appears only once.
    """

    def __init__(self, add: Callable[[Iterable[Frame]], None]) -> None:
        """`add`: a function that receives the joined frames, a few at a time, in order."""
        self._add = add
        self._last: Frame | None = None  # that a clip of this run made
        self._has_frames = False
        self._is_shared = False  # whether the next frame repeats the last one

    def begin_with(self, frames: Iterable[Frame]) -> None:
        """Adds the frames of an earlier video, whose last frame is the first clip's image."""
        self._has_frames = True
        self._add(frames)

    def begin_clip(self) -> Frame | None:
        """Returns the frame from which the next clip starts.

        Returns None for the first clip, and on all ranks except the leader.
        """
        self._is_shared = self._has_frames
        return self._last

    def add(self, frames: Frames) -> None:
        """Adds the next f frames [f, H, W, 3]; the caller must not change these frames later."""
        frames, self._is_shared = frames[int(self._is_shared) :], False
        if len(frames):
            self._last, self._has_frames = frames[-1].copy(), True  # a copy, so that the others can be freed
            self._add(frames)


class FramesFile:
    """Receives a video's frames while they are decoded, and writes them to a file that `np.load` reads.

    `finish` publishes the file; without a successful `finish` no file appears. `add` and `finish` raise ConfigError if
    the file cannot be written.
    """

    def __init__(self, file: Path, num_frames: int, artifacts_dir: Path) -> None:
        """`num_frames`: the frames of the whole video. `artifacts_dir`: the folder that an error message names."""
        self._file, self._num_frames, self._artifacts_dir = file, num_frames, artifacts_dir
        self._open = ExitStack()
        self._stream: BinaryIO | None = None

    def __enter__(self) -> FramesFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Removes what `finish` has not published."""
        with suppress(InterruptedError, ConfigError):
            self._open.__exit__(InterruptedError, InterruptedError(), None)

    def add(self, frames: Iterable[Frame]) -> None:
        """Writes the next frames [H, W, 3]."""
        with writing_to(self._artifacts_dir):
            for frame in frames:
                stream = self._stream or self._begin(frame.shape)
                stream.write(frame.tobytes())
            if self._stream is not None:
                self._stream.flush()  # another process reads the frames while later ones are decoded

    def _begin(self, shape: tuple[int, ...]) -> BinaryIO:
        self._file.parent.mkdir(exist_ok=True)
        paths = atomic_paths(self._file, option="--artifacts-dir", synced=False)
        (unfinished,) = self._open.enter_context(paths)
        self._stream = stream = self._open.enter_context(unfinished.open("wb"))
        form = {"descr": "|u1", "fortran_order": False, "shape": (self._num_frames, *shape)}
        np.lib.format.write_array_header_1_0(stream, form)
        return stream

    def finish(self, document: dict[str, Any]) -> Result:
        """Publishes the file, and returns `document` with one more entry: "frames", the path of the file."""
        self._open.close()
        return document | {"frames": str(self._file)}


def _plan_of(job: Job, made: list[Made]) -> Plan:
    """Returns the plan of the whole video, which is that of its first clip except for the prompts."""
    plan = made[0].plan
    return dataclasses.replace(plan, config=plan.config.replace(prompt=job.config.video.prompt))


def figures_of(made: list[Made]) -> dict[str, Any]:
    """Returns the figures of the whole video, from the figures of its clips.

    The seconds of each stage and the numbers of compiled graphs are added up. The seconds of all steps form one list.
    Of the peaks of memory, the largest counts. `attention_check` is that of the clip with the largest error. All other
    figures are those of the first clip.
    """
    figures, *_ = every = [clip.figures for clip in made]
    stages = dict.fromkeys(stage for each in every for stage in each["seconds"])
    checks = [each["attention_check"] for each in every if each["attention_check"]]
    peaks = zip(*(each["peak_memory_bytes_by_rank"] for each in every), strict=True)
    return figures | {
        "seconds": {stage: sum(each["seconds"].get(stage, 0.0) for each in every) for stage in stages},
        "step_s": [seconds for each in every for seconds in each["step_s"]],
        "attention_check": max(checks, key=lambda check: check["largest"] or 0.0, default=None),
        "compiled_anew": sum(each["compiled_anew"] for each in every),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in every),
        "peak_memory_bytes_by_rank": list(map(max, peaks)),
    }


def _document(plan: Plan, made: list[Made]) -> Result:
    figures = figures_of(made)
    return sidecar.with_seconds(sidecar.planned(plan), figures, figures["seconds"])
