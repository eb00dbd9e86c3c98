"""Runs one rank of a rank group, in a process that the module `elastic` forks.

The rank joins its rank group. Then the rank runs, one by one, the batches of jobs that the parent writes to the run
folder. The rank writes files for the parent: a result for each job, the group's progress, and the error if this rank
fails. A signal ends the rank immediately. This is safe, because the parent removes the half-written files of a dead
rank.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import CancelledError, ConfigError, RankFailedError, WanFastError, failure
from wanfast.runtime.machine.signals import FIRST_BATCH
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.share import Share
from wanfast.runtime.processes import claims
from wanfast.runtime.processes.run_folder import (
    CANCEL,
    CLOSE,
    PROGRESS,
    RANKS,
    SETUP,
    batch_file,
    frames_file,
    result_file,
    write_result,
)
from wanfast.runtime.store.artifacts import replace_text

if TYPE_CHECKING:
    from wanfast.runtime.engine.session import Sessions

MOST_OF_TIMEOUT = 0.8  # without a step, this counts as a timeout, because the host runs ahead of its GPU
_PAUSE_S = 0.02  # between two checks for the next batch


def import_all() -> None:
    """Imports torch and all modules of this package that a rank uses, so that forked ranks share the imports."""
    importlib.import_module("wanfast.runtime.jobs.generate")


def main(run_folder: Path, number: int) -> None:
    """Runs this rank of rank group `number` until there are no more batches. An error ends the process with code 1."""
    own_folder = run_folder / RANKS / f"{number}-{os.environ['RANK']}"
    replace_text(own_folder / "pid", str(os.getpid()))

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Writes the error into the run folder, and only then ends this process with code 1.

        The end of this process causes errors in its peers. The parent takes the oldest error as the cause of the
        failure, so the error of this process must be written first.
        """
        document = _error_document(error, _silent_s(own_folder), _timeout_s(run_folder))
        with suppress(ConfigError):  # without the file the parent still sees that this rank ended
            replace_text(own_folder / "error.json", json.dumps(document))
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)  # torch may buffer sys.stderr
        os._exit(1)  # skips destructors, which may wait for dead peers

    sys.excepthook = leave
    try:
        _work(run_folder, number, own_folder)
    except SystemExit as error:  # does not reach the hook
        leave(type(error), error, error.__traceback__)


def _error_document(error: BaseException, silent_s: float, timeout_s: float) -> dict[str, Any]:
    """Returns an error for the parent: one line, and its kind: "user", "timeout", "exchange" or "bug".

    `silent_s`: seconds since this rank's last step. An exchange that fails after most of `--rank-timeout` waited for a
    peer, which is a timeout; one that fails earlier lost its peer, or was wrong.
    """
    import torch

    known = {"rank": int(os.environ["RANK"]), "time": time.time_ns()}
    if isinstance(error, torch.OutOfMemoryError):
        error = ConfigError(
            "a rank ran out of memory: use a smaller --size, fewer --frames, more GPUs or --dit-fsdp on"
        )
    if isinstance(error, WanFastError):
        return {**known, "kind": "user", **failure(error)}
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    of_exchange = "timeout" if silent_s >= MOST_OF_TIMEOUT * timeout_s else "exchange"
    return {**known, "kind": of_exchange if _is_of_an_exchange(error) else "bug", "error": line}


def _is_of_an_exchange(error: BaseException) -> bool:
    """Returns whether an exchange between ranks raised the error; gloo's errors have no class of their own.

    The innermost function decides: it belongs to torch.distributed, or to our own modules of exchanges. Other functions
    of torch do not count, because an exchange is also started by an operator.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [name for name in modules if name.startswith("torch.distributed") or name.partition(".")[0] != "torch"]
    of_exchanges = ("torch.distributed", "wanfast.runtime.distributed")
    return isinstance(error, RuntimeError) and own[-1:] != [] and own[-1].startswith(of_exchanges)


def _silent_s(own_folder: Path) -> float:
    """Returns the seconds since the last step of this rank, or since its start."""
    signs = (own_folder / name for name in ("pid", PROGRESS))
    return time.time() - max(file.stat().st_mtime for file in signs if file.exists())


def _timeout_s(run_folder: Path) -> float:
    return float(json.loads((run_folder / SETUP).read_text(encoding="utf-8"))["ranks"]["rank_timeout"])


def _work(run_folder: Path, number: int, own_folder: Path) -> None:
    from wanfast.runtime.distributed.ranks import join
    from wanfast.runtime.engine.session import Sessions

    setup = json.loads((run_folder / SETUP).read_text(encoding="utf-8"))
    config = RanksConfig(**setup["ranks"])
    mesh = dataclasses.replace(config.mesh, replica=1)  # of this rank's group
    ranks = join(config.device, mesh, config.rank_timeout)
    sessions = Sessions(ranks, stores_texts=setup["stores_texts"])
    for batch, document in _batches(run_folder):
        _do_batch(run_folder, number, own_folder, batch, document, sessions, setup["groups"])
    ranks.gather(
        None
    )  # no rank leaves while another needs it; the end of the process frees everything, which is faster


def _batches(run_folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, document) of each batch when the parent has written it, until the parent closes the run."""
    for number in itertools.count(int(os.environ.get(FIRST_BATCH, "0"))):
        file = run_folder / batch_file(number)
        while True:
            closed = (run_folder / CLOSE).exists()  # checked first, because the parent writes every batch before CLOSE
            if file.exists():
                break
            if closed:
                return
            time.sleep(_PAUSE_S)
        yield number, json.loads(file.read_text(encoding="utf-8"))


def _do_batch(
    run_folder: Path,
    number: int,
    own_folder: Path,
    batch: int,
    document: dict[str, Any],
    sessions: Sessions,
    groups: int,
) -> None:
    ranks, first = sessions.ranks, document["first"]
    # All machines run the jobs of the first machine, including its seeds.
    jobs = ranks.lead(lambda: document["jobs"])
    ranks.gather(None)  # now every rank has read the file, which the parent may remove after the last result
    last: tuple[int, str, int] | None = None

    def claim(index: int) -> bool:
        return ranks.lead(lambda: claims.claim(run_folder, first + index, number))

    def progress(index: int, stage: str, done: int, total: int) -> None:
        nonlocal last
        state = json.dumps({"job": first + index, "stage": stage, "done": done, "total": total})
        _report(own_folder / PROGRESS, state, own_folder / "pid")
        if ranks.is_leader:
            _report(run_folder / PROGRESS / f"{number}.json", state, own_folder / "pid")
        if not total or last != (index, stage, done):  # the end of a step and the start of the next are reported alike
            last = (index, stage, done)
            if ranks.lead(lambda: (run_folder / CANCEL / str(batch)).exists()):
                raise CancelledError

    def frames_of(index: int) -> Path:
        return frames_file(run_folder, first + index)

    run, parsed = worker_half(document["worker"]), [Job.from_json(job) for job in jobs]
    share = Share(number % groups, groups, claim)
    with _Results(run_folder, first) as results:
        for index, result in run(parsed, sessions, share=share, progress=progress, frames_of=frames_of):
            if int(os.environ["LOCAL_RANK"]) == 0:  # each machine has its own run folder
                results.add(index, result)


class _Results:
    """Writes the results of a batch into the run folder.

    A result may come as a function that completes it. A thread calls this function while the ranks do the next job. The
    next result waits until it has returned, so that the frames of at most two videos are in memory. Any exception of
    the function is the result of its own job, because the ranks are already doing the next job. When the `with` block
    ends, all results are written.
    """

    def __init__(self, run_folder: Path, first: int) -> None:
        self._run_folder, self._first = run_folder, first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._last: Future[None] | None = None

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._thread.shutdown()  # after an error too, because the error belongs to a later job
        if kind is None and self._last is not None:
            self._last.result()

    def add(self, index: int, result: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
        """Writes the result of job `index`.

        If `result` is a function, a thread calls the function and writes what it returns; `add` does not wait for the
        thread. The next call of `add` waits for the thread, and raises an error that the thread raised.
        """
        if self._last is not None:
            self._last.result()
            self._last = None
        if callable(result):
            self._last = self._thread.submit(lambda: self._write(index, _completed(result)))
        else:
            self._write(index, result)

    def _write(self, index: int, result: dict[str, Any]) -> None:
        try:
            write_result(self._run_folder, self._first + index, result)
        except ConfigError:  # an empty file needs no space, and tells the parent
            result_file(self._run_folder, self._first + index).touch()


def _completed(finish: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of `finish`, or a document with its error; the log gets the traceback."""
    try:
        return finish()
    except WanFastError as error:
        return failure(error)
    except Exception as error:  # noqa: BLE001 - a bug or a lack of memory must not end the next job too
        traceback.print_exc()
        return failure(RankFailedError(f"the files of this video could not be completed: {error!r:.300}"))


def _report(file: Path, state: str, instead: Path) -> None:
    """Replaces a progress file. If the disk is full, only changes the time of this file or, without it, of `instead`.

    The changed time shows the parent that this rank does not hang.
    """
    try:
        replace_text(file, state)
    except ConfigError:
        with suppress(OSError):
            os.utime(file if file.exists() else instead)


def worker_half(module: str) -> Callable[..., Iterator[tuple[int, Any]]]:
    """Imports the module named `module`, and returns the module's function `run`, which does a command's jobs.

    `run(jobs, sessions, share=..., progress=..., frames_of=...)` yields (index of the job, result) for each job. A
    result is a JSON document, or a function that makes this document: `_Results.add` accepts both.
    """
    # Imported here and not at the top of this file, because the calibration module lies outside the runtime package.
    run: Callable[..., Iterator[tuple[int, Any]]] = importlib.import_module(module).run
    return run
