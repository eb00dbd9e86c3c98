"""Starts a launcher for each rank group, watches the groups, and returns the result or the error of every job.

The processes communicate only by small files in the run folder: results, progress, and the error of a failed rank. So
the parent can print all results that exist, even after one of the processes has died.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import site
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import (
    CancelledError,
    ConfigError,
    RankFailedError,
    WanFastError,
    failure,
)
from wanfast.runtime.machine.signals import FIRST_BATCH, PARENT
from wanfast.runtime.planning.progress import ProgressFn, ResultFn
from wanfast.runtime.planning.share import MOST_LOADS
from wanfast.runtime.processes.claims import claim, claimed_by, forget, newest
from wanfast.runtime.processes.failures import error_of_group, was_loading
from wanfast.runtime.processes.pace import Pace, follow, works
from wanfast.runtime.processes.run_folder import (
    CANCEL,
    CLOSE,
    RANKS,
    RESULTS,
    SETUP,
    batch_file,
    frames_file,
    result_file,
)
from wanfast.runtime.store.artifacts import note, replace_text, write_synced, writing_to
from wanfast.runtime.store.atomic import remove_partials

_IMPORTED_FROM = Path(__file__).absolute().parents[3]  # at import, because the working folder may change
_PAUSE_S = 0.05  # between two looks at the groups
_GRACE_S = 8.0  # between the request to stop and the kill
_MOST_FAILED_STARTS = 1  # one after the other at one place, of groups that claimed no job: then no rank can start


def num_groups(ranks: RanksConfig, num_jobs: int) -> int:
    """Returns the number of rank groups that this machine starts for a list of jobs: at most one for each job."""
    return min(num_jobs, max(1, ranks.num_gpus // ranks.mesh.group_size))


@dataclasses.dataclass(frozen=True)
class _Batch:
    """This class names a batch of jobs, whose indices count on from batch to batch."""

    number: int
    indices: range
    outputs: tuple[Path, ...] = ()  # that its jobs write
    models: tuple[str, ...] = ()  # what each job loads: jobs with the same text share models

    def loads(self, index: int) -> str:
        """Returns a text that identifies what job `index` loads; jobs with equal texts share models."""
        return self.models[index - self.indices.start]

    def remove(self, run_folder: Path) -> None:
        """Removes the files that belong only to this batch."""
        _remove([run_folder / batch_file(self.number), run_folder / CANCEL / str(self.number)])
        for index in self.indices:
            _remove([result_file(run_folder, index), frames_file(run_folder, index)])
            forget(run_folder, index)


class RankGroups:
    """This class owns the rank groups of a run, and gives them any number of batches of jobs one after another.

    Each rank group has its own launcher process. Any thread may call `run`, but only one thread at a time. When the
    `with` block ends, no launcher and no rank is left.
    """

    def __init__(self, run_folder: Path, ranks: RanksConfig, groups: int, *, stores_texts: bool = True) -> None:
        """Starts the launchers, and does not wait until the ranks are ready. Raises ConfigError.

        `stores_texts`: whether the texts of jobs stay on disk. If false, the ranks store no embedding of a text, and
        the files of a batch are removed when the batch ends.
        """
        _check_endpoint(ranks)
        self._folder, self._ranks, self._groups, self._stores_texts = run_folder, ranks, groups, stores_texts
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}  # place -> its newest launcher
        self._numbers: dict[int, int] = {}  # place -> the number of its group, which grows with each restart
        self._failed_loads: Counter[str] = Counter()  # models -> groups that died while loading them
        self._failed_starts: Counter[int] = Counter()  # place -> groups that died one after the other without a job
        self._given_back: set[int] = set()  # jobs that were given back once
        self._given_up: set[int] = set()  # numbers of dead groups that were looked at
        self._not_started: ConfigError | None = None  # why a dead group could not be started again
        self._hung: dict[int, tuple[int, WanFastError]] = {}  # number -> (nanoseconds since the epoch, its error)
        self._batches = self._jobs = 0  # so far
        self._sent: list[_Batch] = []  # those whose files exist
        # A launcher dies with the thread that started it, and a caller's thread may end before the ranks.
        self._starter = ThreadPoolExecutor(1)
        document = {"ranks": dataclasses.asdict(ranks), "groups": groups, "stores_texts": stores_texts}
        write_synced(run_folder / SETUP, json.dumps(document, indent=2) + "\n")
        with writing_to(run_folder):
            (run_folder / "logs").mkdir(exist_ok=True)
        self._start_missing()

    def __enter__(self) -> RankGroups:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def run(
        self,
        worker: str,
        jobs: list[dict[str, Any]],
        outputs: list[Path],
        *,
        on_result: ResultFn,
        on_progress: ProgressFn,
        on_look: Callable[[Path], None] = lambda frames: None,
        cancelled: Callable[[], bool] = lambda: False,
        is_last: bool = False,
    ) -> list[dict[str, Any]]:
        """Runs a batch of jobs and returns their results in the order of `jobs`; dead rank groups are restarted first.

        `worker`: the name of the module whose function `run` does the jobs. `outputs`: the files that the jobs write.
        `on_result` gets each result as soon as the job is done. `on_look` gets the path of the first job's frames
        twenty times a second, and once more after the last result. `is_last`: whether no batch follows; if true, each
        group ends when no job is left for it.

        If a rank group dies, its current job fails with the group's error. If the group was still writing the files of
        its previous job, the previous job is done again. Usually the group is started again for the remaining
        jobs. A dead group is not started again in these cases:
        * the group died while it loaded models, other groups live, and no job of the dead group is done again;
        * the group spans several machines;
        * for the second time in a row, the group died before it claimed a job.

        If `cancelled()` becomes true, the jobs end and CancelledError is raised. If a callback raises an Exception, the
        jobs end and `run` raises this exception. The ranks keep running after a cancellation or an exception of a
        callback. KeyboardInterrupt ends all ranks immediately. No half-written file is ever left.
        """
        self._start_missing()
        if cancelled():
            raise CancelledError
        batch = self._send({"worker": worker, "jobs": jobs}, outputs)
        try:
            if is_last:
                replace_text(self._folder / CLOSE, "")
            results = self._watch(batch, on_result, on_progress, on_look, cancelled)
            if cancelled():  # perhaps too late for the ranks
                raise CancelledError
        except Exception:
            self._end(batch)
            _remove(frames_file(self._folder, index) for index in batch.indices)
            raise
        except BaseException:
            self.stop()
            raise
        finally:
            self._remove_partials(batch, self._dead())
            if not self._stores_texts:
                self._remove_sent()
        return results

    @property
    def has_dead(self) -> bool:
        """Returns whether a rank group is dead; the next `run` starts it again."""
        return bool(self._dead())

    def close(self) -> None:
        """Asks the ranks to end, and stops ranks that have not ended after 8 s."""
        try:
            with suppress(ConfigError):  # if the disk is full, nobody is asked, and the ranks are stopped at once
                replace_text(self._folder / CLOSE, "")
                ends = time.monotonic() + _GRACE_S
                while time.monotonic() < ends and any(launcher.poll() is None for launcher in self._launchers.values()):
                    time.sleep(_PAUSE_S / 2)
        finally:
            self.stop()
            self._starter.shutdown()

    def stop(self) -> None:
        """Ends all launchers and their ranks immediately."""
        self._stop(self._launchers)

    def _stop(self, places: Iterable[int]) -> None:
        """Ends the launchers and the ranks of the groups at these places, and waits for their end."""
        numbers = [self._numbers[place] for place in places]
        _stop([self._launchers[place] for place in places])
        _kill_ranks(self._folder, numbers)

    def _send(self, document: dict[str, Any], outputs: list[Path]) -> _Batch:
        """Writes a batch for the ranks, and removes the files of the batch before."""
        number, first = self._batches, self._jobs
        indices = range(first, first + len(document["jobs"]))
        outputs = [*outputs, *(frames_file(self._folder, index) for index in indices)]
        models = (json.dumps(job.get("effective", {}).get("models")) for job in document["jobs"])
        batch = _Batch(number, indices, tuple(outputs), tuple(models))
        text = json.dumps({**document, "first": first}, indent=2, ensure_ascii=False) + "\n"
        replace_text(self._folder / batch_file(number), text)  # a batch that is not written has no number
        self._remove_sent()
        self._sent.append(batch)
        self._batches, self._jobs = number + 1, batch.indices.stop
        return batch

    def _remove_sent(self) -> None:
        """Removes the files of the complete batches."""
        if self._groups == 1:  # of several groups, one may not have read a batch that is complete
            for batch in self._sent:
                batch.remove(self._folder)
            self._sent = []

    def _watch(
        self,
        batch: _Batch,
        on_result: ResultFn,
        on_progress: ProgressFn,
        on_look: Callable[[Path], None],
        cancelled: Callable[[], bool],
    ) -> list[dict[str, Any]]:
        """Waits for a batch and returns the result of every job, in order; `run` has the details."""
        results: dict[int, dict[str, Any]] = {}
        paces: dict[int, Pace] = {}
        first = batch.indices.start
        while True:
            if cancelled() and not (sign := self._folder / CANCEL / str(batch.number)).exists():
                replace_text(sign, "")
            dead = self._dead()
            for index in _collect(self._folder, batch.indices, results):
                on_result(index - first, results[index])
            follow(self._folder, self._numbers.values(), first, paces, on_progress)
            self._stop_hanging(batch, paces, results.keys())
            for index, error in self._lost(batch, results.keys(), dead, may_restart=not cancelled()):
                results[index] = failure(error)
                on_result(index - first, results[index])
            on_look(frames_file(self._folder, first))
            if len(results) == len(batch.indices):
                return [results[index] for index in batch.indices]
            time.sleep(_PAUSE_S)

    def _end(self, batch: _Batch) -> None:
        """Cancels a batch and waits for its end, so that the ranks are ready for the next; else stops the ranks."""
        try:
            self._watch(batch, lambda *result: None, lambda *state: None, lambda frames: None, cancelled=lambda: True)
        except BaseException:
            self.stop()
            raise

    def _start_missing(self) -> None:
        """Starts the groups that have no launcher, or lost a rank."""
        self._stop(self._broken())
        self._failed_loads.clear()
        self._failed_starts.clear()
        self._given_up.clear()
        self._not_started = None
        for place in range(self._groups):
            launcher = self._launchers.get(place)
            if launcher is None or launcher.poll() is not None:
                self._start(place, self._batches)

    def _start(self, place: int, batch: int) -> None:
        """Starts a group at its place, whose ranks begin with `batch`."""

        def start() -> None:  # and notes it, even if the thread that asked for it is interrupted
            number = self._numbers[place] + self._groups if place in self._numbers else place
            self._launchers[place] = _start(self._folder, number, batch)
            self._numbers[place] = number

        self._starter.submit(start).result()

    def _broken(self) -> list[int]:
        """Returns the places of groups whose launcher did not notice yet that a rank ended."""
        return [
            place
            for place, launcher in self._launchers.items()
            if launcher.poll() is None and any(map(_has_ended, _pids(self._folder, [self._numbers[place]])))
        ]

    def _dead(self) -> set[int]:
        """Returns the numbers of the groups whose launcher ended."""
        return {self._numbers[place] for place, launcher in self._launchers.items() if launcher.poll() is not None}

    def _stop_hanging(self, batch: _Batch, paces: dict[int, Pace], finished: Collection[int]) -> None:
        """Stops the groups that hang and have a job to do."""
        for place, number in self._numbers.items():
            launcher = self._launchers[place]
            if launcher.poll() is not None:
                continue
            work = partial(works, self._folder, number, launcher.pid, on_cpu=self._ranks.device == "cpu")
            hang = paces[number].hang(self._ranks, work, finished)
            if hang and self._has_job(batch, number, finished):
                _kill_ranks(self._folder, [number])  # first, because the launcher would wait for them
                self._stop([place])
                who = "rank 0" if self._ranks.mesh.group_size == 1 else f"rank group {number}"
                message = f"{who} {hang}; logs of all ranks in {self._folder / 'logs'}"
                self._hung[number] = time.time_ns(), RankFailedError(message)

    def _has_job(self, batch: _Batch, number: int, finished: Collection[int]) -> bool:
        """Returns whether a group claimed a job that is not finished, or can claim one."""
        left = (index for index in batch.indices if index not in finished)
        return any(claimed_by(self._folder, index) in (None, number) for index in left)

    def _error_of(self, number: int) -> tuple[int, WanFastError]:
        """Returns (nanoseconds since the epoch, why a group died)."""
        return self._hung.get(number) or error_of_group(self._folder, number, self._ranks)

    def _lost(
        self, batch: _Batch, done: Collection[int], dead: set[int], *, may_restart: bool
    ) -> Iterator[tuple[int, WanFastError]]:
        """Yields the jobs that the dead groups claimed, with their errors, and starts groups again for those left.

        A rank may outlive its launcher and claim a job after its group was started again, so a job can also belong to
        a group that was replaced. If no group lives then, yields all jobs that are left.
        """
        current = set(self._numbers.values())
        if not dead and not self._given_up:
            return
        claims = {index: claimed_by(self._folder, index) for index in batch.indices if index not in done}
        if not claims:
            return
        ended = dead | {number for number in claims.values() if number is not None and number not in current}
        errors = {number: self._error_of(number) for number in ended}
        again = self._incomplete(claims, dead - self._given_up) if may_restart else set()
        yield from (
            (index, errors[number][1]) for index, number in claims.items() if number in errors and index not in again
        )
        left = [index for index, number in claims.items() if number is None]
        if dead and (left or again) and may_restart:
            lost = self._replace(batch, dead, claims, again)
            yield from ((index, errors[number][1]) for index, number in lost.items())
            left = [index for index in left if index not in lost]
        if dead >= set(self._numbers.values()):  # by the same look, so that a group that died since is not lost
            _, error = min((errors[number] for number in dead), key=lambda found: found[0])
            yield from ((index, self._not_started or error) for index in left)

    def _incomplete(self, claims: dict[int, int | None], died: set[int]) -> set[int]:
        """Returns the jobs without a result that are given back, so that they are done again.

        The groups `died` just now. A group that dies with two jobs had left the files of the earlier one to its thread
        when it claimed the later one. The later one counts as the cause. If the earlier one was given back before, it
        counts as the cause instead, and the later one is given back. So no job is given back twice.
        """
        if self._ranks.nnodes > 1:
            return set()
        found: set[int] = set()
        for number in died:
            own = {index for index, owner in claims.items() if owner == number}
            found |= own - (own & self._given_back or {newest(self._folder, sorted(own))}) if own else set()
        return found

    def _replace(
        self, batch: _Batch, dead: set[int], claims: dict[int, int | None], again: Collection[int]
    ) -> dict[int, int]:
        """Starts each dead group again, once; `claims` are those of the jobs without a result.

        A group that is started again gives back its jobs in `again`, so that they are done again.
        A group that died while it loaded leaves the list to the others, if others live and it gives no job back. A
        place where one group after the other claimed no job stays empty. Returns the jobs whose models killed one
        group after the other, each with the last group's number. A group that spans machines is not started again,
        because the other machines would have to start it too.
        """
        lost: dict[int, int] = {}
        if self._ranks.nnodes > 1:
            return lost
        new = [place for place, number in self._numbers.items() if number in dead - self._given_up]
        claimed = {claimed_by(self._folder, index) for index in batch.indices} if new else set()
        for place in new:
            number = self._numbers[place]
            self._given_up.add(number)
            given_back = [index for index in again if claims[index] == number]
            self._failed_starts[place] = 0 if number in claimed else self._failed_starts[place] + 1
            if number in claimed and was_loading(self._folder, number):
                others_live = len(dead) < self._groups
                if others_live and not given_back:  # the others may have ended when a job is given back
                    continue
                own = {index for index, owner in claims.items() if owner == number} - set(given_back)
                for models in () if others_live else {batch.loads(index) for index in own}:
                    self._failed_loads[models] += 1
                    if self._failed_loads[models] >= MOST_LOADS:
                        alike = [
                            index for index, owner in claims.items() if owner is None and batch.loads(index) == models
                        ]
                        lost |= dict.fromkeys(alike, number)
            try:
                for index in lost:  # claimed, so that no group tries it
                    claim(self._folder, index, number)
                if self._failed_starts[place] <= _MOST_FAILED_STARTS:
                    self._remove_partials(batch, {number})
                    for index in given_back:
                        forget(self._folder, index)
                    self._given_back.update(given_back)
                    self._start(place, batch.number)
            except ConfigError as error:  # this place stays empty
                for index in given_back:
                    claim(self._folder, index, number)
                note(str(error))
                self._not_started = error
        return lost

    def _remove_partials(self, batch: _Batch, dead: set[int]) -> None:
        """Removes the half-written files of dead groups."""
        remove_partials(batch.outputs, _ended_pids(_pids(self._folder, dead)))


def _start(run_folder: Path, number: int, batch: int) -> subprocess.Popen[bytes]:
    """Starts the launcher of group `number`, whose ranks begin with batch `batch`. Raises ConfigError."""
    command = [sys.executable, "-u", "-m", "wanfast.runtime.processes.elastic", str(run_folder), str(number)]
    file = run_folder / "logs" / f"launcher-{number}.log"
    with writing_to(file):
        log = file.open("wb")
    environment = child_environment() | {PARENT: str(os.getpid()), FIRST_BATCH: str(batch)}
    try:
        with log:
            # In a new session Ctrl-C does not reach the launcher: only this process gets Ctrl-C and then stops all.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
    except OSError as error:  # for want of memory, or of a process's number
        raise ConfigError(
            f"the ranks of group {number} cannot be started ({error.strerror or error}): end other programs, or allow "
            "more processes (`ulimit -u`)"
        ) from error


def child_environment() -> dict[str, str]:
    """Returns this process's environment, changed so that a child process can import this package.

    The child does not import modules from the working folder.
    """
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    path = [] if _IMPORTED_FROM.resolve() in installed else [str(_IMPORTED_FROM)]  # a checkout
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(path)} if path else {})}


def _stop(launchers: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ends launchers and their ranks, and waits for their end."""
    living = [launcher for launcher in launchers if launcher.poll() is None]
    for launcher in living:
        launcher.terminate()
    ends = time.monotonic() + _GRACE_S
    for launcher in living:
        try:
            launcher.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            launcher.kill()  # its ranks die with it
            launcher.wait()


def _kill_ranks(run_folder: Path, numbers: Iterable[int]) -> None:
    """Kills the living ranks of groups. A rank that SIGSTOP or a debugger has stopped does not act on other signals."""
    import psutil

    for file in _pid_files(run_folder, numbers):
        with suppress(psutil.NoSuchProcess):
            rank = psutil.Process(int(file.read_text()))
            if rank.create_time() <= file.stat().st_mtime:  # a later process may have got the id of a rank that ended
                rank.kill()


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _collect(run_folder: Path, indices: range, results: dict[int, dict[str, Any]]) -> list[int]:
    """Adds the new results to `results` and returns their indices."""
    files = {int(file.stem): file for file in (run_folder / RESULTS).glob("*.json")}
    new = [index for index in indices if index in files and index not in results]
    results |= {index: _result(files[index]) for index in new}
    return new


def _result(file: Path) -> dict[str, Any]:
    """Returns the result of a job, or its failure if the rank could not write the result into its file."""
    if text := file.read_text(encoding="utf-8"):
        document: dict[str, Any] = json.loads(text)
        return document
    reason = "the result of this job could not be written: free some space, or choose another folder"
    return failure(ConfigError(f"--artifacts-dir {file}: {reason}"))


def _pids(run_folder: Path, numbers: Iterable[int]) -> list[int]:
    return [int(file.read_text()) for file in _pid_files(run_folder, numbers)]


def _pid_files(run_folder: Path, numbers: Iterable[int]) -> list[Path]:
    return [file for number in numbers for file in (run_folder / RANKS).glob(f"{number}-*/pid")]


def _has_ended(pid: int) -> bool:
    """Returns whether a process is gone, or waits only for its parent to notice its end."""
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def _ended_pids(pids: list[int]) -> list[int]:
    """Returns `pids` when they have ended, or after 2 s: ranks live a little longer than a killed launcher."""
    ends = time.monotonic() + 2
    while time.monotonic() < ends and any(Path("/proc", str(pid)).exists() for pid in pids):
        time.sleep(0.02)
    return pids


def _check_endpoint(config: RanksConfig) -> None:
    """Raises ConfigError if the port of machine 0 is taken, because the other machines would wait for their timeout."""
    if config.rdzv_endpoint is None or config.node_rank != 0:
        return
    host, port = config.rdzv_endpoint.rsplit(":", 1)
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--rdzv-endpoint {host}:{port}: {reason}: use a port that is free on this machine") from None
