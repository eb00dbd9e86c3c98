"""Makes the videos of the queued jobs, one after another, on the ranks of one handle.

Three threads work at the same time:
* The thread that calls `run` makes the videos. x264 encodes a video's first frames while later frames are decoded.
* The writer completes the files of a video, while the next video is made.
* The watch stops the current video if its job was cancelled. It also tells the database every few seconds that the
  running attempts are alive, so that no other server makes their videos.
This module does not import torch.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from wanfast.runtime.config import OutputConfig, parse_size
from wanfast.runtime.errors import CancelledError, ConfigError, NotFiniteError, RankFailedError, WanFastError
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.progress import StageFn, share_done
from wanfast.runtime.processes.handle import RecordFn, Video
from wanfast.runtime.store.artifacts import note
from wanfast.server.files import Files
from wanfast.server.metrics import Metrics
from wanfast.server.replies import in_fields, without_paths
from wanfast.server.store import FAULT, MOST_ATTEMPTS, Store, StoredJob

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_WATCH_S = 0.1  # between two looks at the running jobs
_RENEW_S = 5.0  # between two renewals of a lease without progress
_SWEEP_S = 10.0  # between two searches for lost attempts and files that nobody wants
_IDLE_S = 0.5  # between two looks at an empty queue, which another server may have filled
_DATABASE_S = 20.0  # a change waits this long for a database that does not answer, which is less than a lease
_MOST_UNWRITTEN = 2  # videos at once: one is being made, and one is being written
_MOST_STARTS = 3  # of ranks that fail one after the other while they load
_OF_DENOISING = 95  # percent; the rest is for decoding and writing
_OF_THE_PLAN = (
    "recipe", "model", "width", "height", "frames", "clips", "total_frames", "joining_bytes", "fps", "duration_s",
    "solver", "shift", "steps", "guidance", "forwards", "precision", "attention", "quantize", "compile", "device",
    "mesh", "seed",
)  # fmt: skip
_WRITING = "writing"  # a stage, in which no error is the client's
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (RankFailedError, "rank_failed"),
    (NotFiniteError, "not_finite"),
    (ConfigError, "invalid_video"),
    (Exception, FAULT),
)
_UNSAID = "the server could not make this video; the server's log has the reason"
T = TypeVar("T")


class Maker(Protocol):
    """This interface makes videos; `Handle` implements it."""

    def make(self, *, on_progress: StageFn, on_frames: RecordFn, **options: Any) -> Video:
        """Makes one video and waits for it; the arguments are those of `Handle.make`. Raises WanFastError."""

    def cancel(self) -> None:
        """Cancels the video that is being made."""


@dataclass
class _Run:
    """This class holds what the threads know of a running attempt."""

    job: StoredJob
    stage: str = ""
    progress: int = 0
    written: tuple[str, int] = ("", 0)  # the stage and the progress that the database has
    renewed: float = field(default_factory=time.monotonic)
    recording: sidecar.Recording | None = None  # from the first frames on

    def report(self, stage: str, done: int, total: int) -> None:
        """Records a clip's stage, and the progress of the whole video in percent.

        `done` of the `total` steps of the clip are finished.
        """
        self.stage, self.progress = stage, int(_OF_DENOISING * share_done(stage, done, total))


class Worker:
    """This class runs the queued jobs of one server."""

    def __init__(
        self,
        store: Store,
        maker: Maker,
        files: Files,
        metrics: Metrics,
        *,
        keep_s: float,
        warm_up: Mapping[str, Any],
        total_frames: int,
    ) -> None:
        """Prepares the worker; `run` does the work.

        `keep_s`: the seconds for which a finished video can be downloaded. `warm_up`: the options of a short video that
        loads and compiles the models. `total_frames`: the number of frames of the longest video, for which the disk
        must have room.
        """
        self._store, self._maker, self._files, self._metrics = store, maker, files, metrics
        self._keep_s, self._warm_up = keep_s, warm_up
        width, height = parse_size(warm_up["size"])
        frames_bytes = width * height * 3 * total_frames  # the ranks give them in a file, often on the same disk
        self._needed_bytes = frames_bytes + _MOST_UNWRITTEN * frames_bytes // 4  # a quarter, as `Video.save` asks for
        self._had_room = True
        self._runs: dict[str, _Run] = {}  # by the names of their attempts, because a lost one may still be written
        self._making: object = None  # what the ranks have
        self._lock = threading.Lock()  # of `_making`, so that a cancel ends no other video
        self._wakes, self._has_ended = threading.Event(), threading.Event()
        self._is_loaded = self._is_stopping = self._lost_ranks = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: Future[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Returns whether the models are loaded and the server is not stopping."""
        return self._is_loaded and not self._is_stopping

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def status(self) -> Literal["ready", "loading", "stopping"]:
        return "stopping" if self._is_stopping else "ready" if self._is_loaded else "loading"

    def wake(self) -> None:
        """Tells `run` that the queue may have a new job."""
        self._wakes.set()

    def stop(self) -> None:
        """Makes `run` return soon: the current video stops at its next step, and its job is queued again.

        The first call prints a note that says so.
        """
        making, is_first = self._making, not self._is_stopping
        self._is_stopping = True  # the watch thread reads this flag
        if is_first:
            current = "no video is being made"
            if isinstance(making, _Run):
                current = f"{making.job.id} stops at its next step and is queued again"
            note(f"the server is stopping: {current}; finished videos are written")

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Makes videos until `stop` is called. Raises WanFastError if the ranks cannot load the models.

        `on_ready` is called once, when the models are loaded; if `stop` was called before, `on_ready` is not called.
        """
        watch = threading.Thread(target=self._watch, name="watch")
        watch.start()
        try:
            self._load()
            self._is_loaded = True
            if self.is_ready:
                on_ready()
            while not self._is_stopping:
                self._wakes.clear()
                if self._has_room() and (claimed := _patiently(self._store.claim)):
                    job, images = claimed
                    self._do(_Run(job), images)
                else:
                    self._wakes.wait(_IDLE_S)
        finally:
            self._writer.shutdown()
            self._is_stopping = True  # so that requests which wait end, if an error ended the loop
            self._has_ended.set()
            watch.join()

    def _has_room(self) -> bool:
        """Returns whether the disk has room for the next video; if not, a note says once that the queue waits."""
        has_room: bool = self._files.free_bytes() >= self._needed_bytes
        if self._had_room and not has_room:
            needed = gb(self._needed_bytes)
            note(f"--data-dir {self._files.folder}: less than {needed} are free, so the queue waits: free some space")
        self._had_room = has_room
        return has_room

    def _load(self) -> None:
        """Lets the ranks make a short video, so that the models are loaded and compiled. Raises WanFastError."""
        for start in range(1, _MOST_STARTS + 1):
            try:
                with suppress(CancelledError):  # by `stop`
                    self._made(self, lambda stage, done, total: None, lambda plan, frames: None, self._warm_up)
                return
            except RankFailedError as error:
                self._metrics.ranks_failed()
                note(f"the ranks failed while they loaded the models: {error}")
                if start == _MOST_STARTS:
                    raise

    def _do(self, run: _Run, images: Mapping[str, bytes]) -> None:
        """Makes the video of a claimed job, and gives it to the writer; or ends the attempt with an error.

        `images`: the content of each image file of the job, by the option of `Handle.make` that gets the image.
        """
        self._runs[run.job.attempt] = run
        with self._errors_of(run), ExitStack() as opened:
            files = {option: self._files.image(run.job.attempt, option) for option in images}
            try:
                for option, file in files.items():
                    file.write_bytes(images[option])
                given = {option: str(file) for option, file in files.items()}
                video = self._made(run, run.report, partial(self._record, run, opened), {**run.job.options, **given})
            finally:
                for file in files.values():
                    file.unlink(missing_ok=True)
            writing, self._writing = self._writing, None  # an error of the writer is raised once
            if writing is not None:
                writing.result()  # so that no more than two videos lie in memory
            self._writing = self._writer.submit(self._finish, run, video, opened.pop_all())
        if self._lost_ranks:
            self._lost_ranks = False
            self._load()

    def _made(self, token: object, on_progress: StageFn, on_frames: RecordFn, options: Mapping[str, Any]) -> Video:
        with self._lock:
            self._making = token
        try:
            return self._maker.make(on_progress=on_progress, on_frames=on_frames, **options)
        finally:
            with self._lock:
                self._making = None

    def _record(self, run: _Run, opened: ExitStack, plan: Plan, frames: npt.NDArray[np.uint8]) -> None:
        """Queues frames for x264, which encodes them while later ones are decoded.

        At the end of `opened`, files that are not complete are removed. Raises ConfigError.
        """
        if run.recording is None:
            video = plan.config.video
            outputs = self._output(run).paths
            recording = sidecar.Recording(outputs, video.fps, video.total_frames, overwrite=True)
            run.recording = opened.enter_context(recording)
        run.recording.add(frames)

    def _output(self, run: _Run) -> OutputConfig:
        return OutputConfig(output=str(self._files.video(run.job.attempt)), overwrite=True)

    def _finish(self, run: _Run, video: Video, opened: ExitStack) -> None:
        """Completes the files of a video, and then ends its job. Closes `opened`, which holds the files."""
        with self._errors_of(run), opened:
            run.stage, started = _WRITING, time.perf_counter()
            self._files.write_thumbnail(run.job.attempt, video.frames[0])
            assert run.recording is not None, "the maker gave no frames"
            run.recording.finish(sidecar.moved(video.document, self._output(run)))
            seconds = {**video.document["seconds"], "write": round(time.perf_counter() - started, 3)}
            seconds["total"] = round(sum(value for stage, value in seconds.items() if stage != "total"), 3)
            plan, magcache = {name: video.plan[name] for name in _OF_THE_PLAN}, video.plan["magcache"]
            skipped = magcache["skipped_forwards"] if magcache else 0
            facts = {"seconds_by_stage": seconds, "plan": {**plan, "skipped_forwards": skipped}}
            if _patiently(lambda: self._store.complete(run.job, run.job.attempt, facts, self._keep_s)):
                stages = {stage: value for stage, value in seconds.items() if stage != "total"}
                clips = plan["clips"]
                self._metrics.completed(stages, clips * (plan["forwards"] - skipped), clips * skipped)
            del self._runs[run.job.attempt]

    @contextmanager
    def _errors_of(self, run: _Run) -> Iterator[None]:
        """Ends the attempt with any error of the block, so that the error costs no other job."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a bug costs one job too, and its traceback is printed
            if not isinstance(error, WanFastError):
                with suppress(OSError):  # of a log on a full disk
                    traceback.print_exception(error)
            elif not isinstance(error, CancelledError):
                note(f"{run.job.id}: {error}")
            if isinstance(error, RankFailedError):
                self._metrics.ranks_failed()
                self._lost_ranks = True
            _patiently(partial(self._end, run, error))
            del self._runs[run.job.attempt]

    def _end(self, run: _Run, error: Exception) -> bool:
        """Queues or ends the job of an attempt after an error; returns False if the attempt no longer owns the job."""
        job = run.job
        if isinstance(error, CancelledError):
            return self._store.requeue(job, counts=not self._is_stopping)
        if isinstance(error, RankFailedError) and job.attempts < MOST_ATTEMPTS:
            return self._store.requeue(job, counts=True)
        code = next(code for kind, code in _CODES if isinstance(error, kind))
        is_for_clients = isinstance(error, ConfigError | NotFiniteError) and run.stage != _WRITING
        message = without_paths(in_fields(error)[0], _UNSAID) if is_for_clients else _UNSAID
        if isinstance(error, ConfigError) and message == _UNSAID:  # of a folder or a disk, and not of the request
            code = FAULT
        ended = self._store.fail(job, code, message)
        if ended:
            self._metrics.failed(code)
        return ended

    def _watch(self) -> None:
        """Looks after the running jobs and the files until `run` ends."""
        swept = -_SWEEP_S
        while not self._has_ended.wait(_WATCH_S):
            with _noted():
                for run in list(self._runs.values()):
                    if not self._is_held(run):
                        self._cancel(run)
            if self._is_stopping:
                self._wakes.set()
                self._cancel(self._making)
            if time.monotonic() - swept > _SWEEP_S:
                swept = time.monotonic()
                with _noted():
                    self._sweep()

    def _is_held(self, run: _Run) -> bool:
        """Returns whether an attempt still owns its job. Renews the lease every 5 seconds, and at each new progress."""
        state = run.stage, run.progress
        if state == run.written and time.monotonic() - run.renewed < _RENEW_S:
            return self._store.is_held(run.job)
        run.written, run.renewed = state, time.monotonic()
        return self._store.hold(run.job, *state)

    def _cancel(self, token: object) -> None:
        with self._lock:
            if token is not None and self._making is token:
                self._maker.cancel()

    def _sweep(self) -> None:
        """Queues the jobs of lost attempts again, and removes files and rows that are no longer needed."""
        queued, failed = self._store.recover(all_lost=False)
        self._metrics.failed(FAULT, failed)
        if queued:
            self.wake()
        listed = self._files.listed()
        self._files.sweep(listed, self._store.outputs())
        self._store.forget()


@contextmanager
def _noted() -> Iterator[None]:
    """Prints an error of the database, or of the folder of the videos, as a note."""
    try:
        yield
    except SQLAlchemyError as error:
        problem = " ".join(str(error).split())
        note(f"the server's database reports an error ({problem:.200}): check the database and its disk")
    except OSError as error:
        note(f"--data-dir: the file system reports an error ({error}): check the folder and its disk")


def _patiently(change: Callable[[], T]) -> T | None:
    """Returns the result of a call of the database; None if the database has not answered for some time.

    After None, the job's lease expires, and its video is made again.
    """
    ends = time.monotonic() + _DATABASE_S
    while time.monotonic() < ends:
        with _noted():
            return change()
        time.sleep(1)
    return None
