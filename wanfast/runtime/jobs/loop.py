"""Runs jobs one after the other on loaded models, for every command that makes or measures videos.

All ranks of a rank group run the same jobs in the same order. Each rank group first runs its own part of the list of
jobs, and then jobs that no rank group has claimed. Before a rank group loads a job's models, it finds all jobs in its
part that use the same models. The group encodes the prompts of these jobs, and then frees UMT5.
If a job raises a WanFastError or runs out of memory, the job's result is the error, and the other jobs continue.
What happens if models cannot be loaded depends on the number of rank groups and on the error:

* If there is only one rank group, or if a file is missing or corrupt, the job fails. The next job with the same models
  tries again to load them. After MOST_LOADS failed tries, the rank group's other jobs with the same models fail too.
* If there are several rank groups and no file is missing or corrupt, the rank group ends. The other rank groups run the
  remaining jobs, because they may have enough memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from wanfast.runtime.config import ModelsConfig, VideoConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.pipeline import DOES_NOT_FIT
from wanfast.runtime.engine.session import Session, Sessions
from wanfast.runtime.errors import (
    CancelledError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    NotFiniteError,
    WanFastError,
    failure,
)
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.progress import LOADING, ProgressFn, StageFn
from wanfast.runtime.planning.share import MOST_LOADS, Share

Result = dict[str, Any]  # the verb's document, or {"error", "exit_code"}
FinishFn = Callable[[], Result]  # completes a result on the leader, without the other ranks
FrameFileFn = Callable[[int], Path]  # (job) -> the file of its frames, if the job has no output file
T = TypeVar("T")
WorkFn = Callable[[int, Job, Session, ProgressFn], T]


def run_jobs(
    work: WorkFn[T], jobs: list[Job], sessions: Sessions, share: Share, progress: ProgressFn
) -> Iterator[tuple[int, T | Result]]:
    """Runs `work` on every job that this rank group claims; yields (index of the job, result) for each of these jobs.

    The result is what `work` returned. If the job failed, the result is the error as a document {"error", "exit_code"}.
    Jobs with the same models run one after the other, so that models are loaded once.
    """
    groups: dict[ModelsConfig, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.config.models, []).append(index)
    for indices in groups.values():
        yield from _run_alike(work, {index: jobs[index] for index in indices}, sessions, share, progress)


def measuring(measure: WorkFn[Result]) -> Callable[..., Iterator[tuple[int, Result]]]:
    """Returns the part of a calibration that runs on ranks: a function `run`, which calls `measure` for each job.

    `measure` makes and measures the clip of one job, and returns the measurements. `run` yields them.
    """

    def run(
        jobs: list[Job],
        sessions: Sessions,
        *,
        share: Share = Share(),
        progress: ProgressFn = lambda index, stage, done, total: None,
        frames_of: FrameFileFn | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """Yields (index of the job, measurements of its clip) for each job, as soon as the clip is done.

        `share` says which jobs this rank group takes. `frames_of` is not used, because no frames are kept.
        """
        yield from run_jobs(measure, jobs, sessions, share, progress)

    return run


def by_step(progress: StageFn, steps: int, *, then: str = "") -> Callable[[int, Expert], None]:
    """Returns a function that reports each step of denoising, with the name of the step's expert as the stage.

    `then`: the stage that follows the last step, if there is one.
    """
    return lambda done, expert: progress(then if then and done == steps else expert.replace("_", " "), done, steps)


def _run_alike(
    work: WorkFn[T], jobs: dict[int, Job], sessions: Sessions, share: Share, progress: ProgressFn
) -> Iterator[tuple[int, T | Result]]:
    """Runs `work` on jobs that share models. A job whose models cannot be loaded fails, and the next job tries again.

    After the last of MOST_LOADS tries, all jobs that this rank group can still claim fail for the same reason.
    """
    claimed = share.claimed(list(jobs))
    for tries, index in enumerate(claimed, 1):
        session = _loaded(index, jobs, sessions, share, progress)
        if isinstance(session, Session):
            break
        lost = claimed if tries == MOST_LOADS else ()
        yield from ((failed, session) for failed in (index, *lost))
    else:
        return
    remaining = itertools.chain((index,), claimed)
    for index in remaining:
        job = jobs[index]
        try:
            yield index, work(index, job, session, progress)
        except (WanFastError, torch.OutOfMemoryError) as error:
            video = job.config.video
            message = f"--size {video.size} --frames {video.frames}: {DOES_NOT_FIT}"
            yield index, _failure(error, sessions.ranks, message)
        session.forget_seconds()


def _loaded(
    index: int, jobs: dict[int, Job], sessions: Sessions, share: Share, progress: ProgressFn
) -> Session | Result:
    """Returns a session with the texts and the models of the jobs, or the result of job `index` if loading failed."""
    config = jobs[index].config
    loading = partial(progress, index, LOADING, 0, 0)
    try:
        loading()
        session = sessions.of(config)
        _encode(session, [jobs[own].config.video for own in dict.fromkeys((index, *share.own(list(jobs))))])
        session.load(loading)
        return session
    except CancelledError as error:  # models that are loaded stay
        return failure(error)
    except (WanFastError, torch.OutOfMemoryError) as error:
        models = f"--model {config.models.model} --precision {config.models.precision}"
        on_gpu = sessions.ranks.device == "cuda"
        fix = "use a larger GPU, several GPUs, or --expert-offload on" if on_gpu else "end other programs, or use a GPU"
        if share.groups > 1 and not isinstance(error, MissingArtifactError | CorruptArtifactError):
            raise  # other rank groups may have more memory and run the remaining jobs
        failed = _failure(error, sessions.ranks, f"{models}: the weights do not fit into memory: {fix}")
        is_intact = sessions.are_loaded and isinstance(error, WanFastError)  # a wrong LoRA or text harms no model
    if not is_intact:
        sessions.close()  # only here, because the error holds what was loaded
    return failed


def _encode(session: Session, videos: list[VideoConfig]) -> None:
    """Encodes the texts of videos. If they are several, an error of one is left to its job, which encodes it again."""
    try:
        session.encode(texts for video in videos for texts in video.texts)
    except NotFiniteError as error:
        if len(videos) == 1 or not (error.is_agreed or session.ranks.size == 1):
            raise


def _failure(error: Exception, ranks: Ranks, out_of_memory: str) -> Result:
    """Returns the result of a failed job; raises an error of one rank only, which must end the waiting group."""
    if ranks.size > 1 and not (isinstance(error, WanFastError) and error.is_agreed):
        raise error
    if isinstance(error, WanFastError):
        return failure(error)
    return failure(ConfigError(out_of_memory))
