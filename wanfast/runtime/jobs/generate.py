"""The worker half of `wanfast generate` makes each video and writes it with its JSON.

`run_jobs` is the loop for all jobs that need loaded models. All prompts of the jobs that share models are encoded
first, so that UMT5 is freed before the experts are loaded. If a job fails with a user's error, the error is recorded
and the other jobs still run. Every rank of a group runs this loop in lockstep; only the leader writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Made, Session, Sessions
from wanfast.runtime.errors import (
    CancelledError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    WanFastError,
    failure,
)
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Job
from wanfast.runtime.store.artifacts import frames_file, writing_to
from wanfast.runtime.store.atomic import atomic_paths

Result = dict[str, Any]  # the document of `sidecar`, or {"error", "exit_code"}
ProgressFn = Callable[[int, str, int, int], None]  # (job, stage, steps done, of all steps)
ClaimFn = Callable[[int], bool]  # whether this rank group gets a job that others may claim
FrameFileFn = Callable[[int], Path]
WorkFn = Callable[[int, Job, Session, ProgressFn], Result]


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    claim: ClaimFn | None = None,
    progress: ProgressFn = lambda index, stage, done, total: None,
    folder: Path,
    first: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Yields (index, result) of each job when it is done, except jobs that `claim` leaves to another rank group.

    `folder` is the run folder. It gets the frames of jobs that write no video, numbered from `first` on.
    """
    work = partial(make_video, frames_of=lambda index: frames_file(folder, first + index))
    yield from run_jobs(work, jobs, sessions, claim, progress)


def run_jobs(
    work: WorkFn, jobs: list[Job], sessions: Sessions, claim: ClaimFn | None, progress: ProgressFn
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on every job; jobs that share models run one after the other."""
    groups: dict[ModelsConfig, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.config.models, []).append(index)
    for indices in groups.values():
        yield from _run_alike(work, {index: jobs[index] for index in indices}, sessions, claim, progress)


def _run_alike(
    work: WorkFn, jobs: dict[int, Job], sessions: Sessions, claim: ClaimFn | None, progress: ProgressFn
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on jobs that share models."""
    claimed = (index for index in jobs if claim is None or claim(index))
    index = next(claimed, None)
    if index is None:
        return
    config = jobs[index].config
    loading = partial(progress, index, "loading the models", 0, 0)
    try:
        loading()
        session = sessions.of(config)
        videos = [job.config.video for job in jobs.values()]
        session.encode(text for video in videos for text in (video.prompt, video.negative_prompt))
        session.load(loading)
    except CancelledError as error:  # models that are loaded stay
        yield from ((cancelled, failure(error)) for cancelled in (index, *claimed))
        return
    except (WanFastError, torch.OutOfMemoryError) as error:
        sessions.close()
        models = f"--model {config.models.model} --precision {config.models.precision}"
        message = f"{models}: the weights do not fit into this GPU's memory: use a larger GPU, several GPUs, or"
        if claim is not None and not isinstance(error, MissingArtifactError | CorruptArtifactError):
            raise  # other rank groups may have more memory and run the remaining jobs
        document = _failure(error, sessions.ranks, f"{message} --expert-offload on")
        yield from ((failed, document) for failed in (index, *claimed))
        return
    while index is not None:
        job = jobs[index]
        try:
            yield index, work(index, job, session, progress)
        except (WanFastError, torch.OutOfMemoryError) as error:
            video = job.config.video
            size = f"--size {video.size} --frames {video.frames}"
            message = f"{size}: does not fit into this GPU's memory beside the weights: use smaller values"
            yield index, _failure(error, sessions.ranks, message)
        session.forget_seconds()
        index = next(claimed, None)


def _failure(error: Exception, ranks: Ranks, out_of_memory: str) -> Result:
    """Returns the result of a failed job; raises an error of one rank only, which must end the waiting group."""
    if ranks.size > 1 and not (isinstance(error, WanFastError) and error.is_agreed):
        raise error
    if isinstance(error, WanFastError):
        return failure(error)
    return failure(ConfigError(out_of_memory))


def make_video(index: int, job: Job, session: Session, progress: ProgressFn, *, frames_of: FrameFileFn) -> Result:
    """Makes one video; the leader writes the video and its JSON, or only its frames if the job has no outputs."""
    steps = job.config.video.steps
    progress(index, "encoding the image", 0, steps)

    def on_step(done: int, expert: Expert) -> None:
        progress(index, expert.replace("_", " "), done, steps)

    made = session.make(job, on_step)
    return session.ranks.lead(lambda: _write(made, frames_of(index)))


def _write(made: Made, file: Path) -> Result:
    assert made.frames is not None
    plan, seconds = made.plan, made.facts["seconds"]
    document = sidecar.with_seconds(sidecar.planned(plan), made.facts, seconds)
    if plan.outputs:
        return sidecar.write_video(made.frames, document, plan.outputs, overwrite=plan.config.output.overwrite)
    with writing_to(Path(plan.config.models.artifacts_dir)):
        file.parent.mkdir(exist_ok=True)
    with atomic_paths(file, option="--artifacts-dir", synced=False) as (unfinished,), unfinished.open("wb") as stream:
        np.save(stream, made.frames)
    return document | {"frames": str(file)}
