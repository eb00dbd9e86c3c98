"""Starts a launcher for each rank group, watches the groups, and returns the result or the error of every job.

The processes communicate only by small files in the run folder: results, progress, and the error of a failed rank. So
the parent can print the existing results whichever process died. Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, failure, from_failure
from wanfast.runtime.machine.signals import FIRST_BATCH, PARENT
from wanfast.runtime.store.artifacts import (
    CANCEL,
    CLAIMS,
    CLOSE,
    PROGRESS,
    RANKS,
    RESULTS,
    SETUP,
    batch_file,
    replace_text,
    write_synced,
    writing_to,
)
from wanfast.runtime.store.atomic import remove_partials

_PAUSE_S = 0.1
_GRACE_S = 8.0  # between the request to stop and the kill
_OUTLIVED_S = 5.0  # a rank that ends this long after a peer's error did not cause it
_MOST = 0.8  # share of --rank-timeout without a step that counts as a timeout, because the host runs ahead of its GPU


def num_groups(ranks: RanksConfig, num_jobs: int) -> int:
    """Returns the number of rank groups that this machine starts for a list of jobs: at most one for each job."""
    return min(num_jobs, max(1, ranks.num_gpus // ranks.mesh.group_size))


class RankGroups:
    """This class owns the rank groups of a run, each under a launcher process, for any number of batches of jobs.

    Any thread may call `run`, one at a time. When the `with` block ends, no launcher and no rank is left.
    """

    def __init__(self, run_folder: Path, ranks: RanksConfig, groups: int) -> None:
        """Starts the launchers; the ranks become ready meanwhile. Raises ConfigError."""
        _check_endpoint(ranks)
        self._folder, self._ranks, self._groups = run_folder, ranks, groups
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}  # place -> its newest launcher
        self._numbers: dict[int, int] = {}  # place -> the number of its group, which grows with each restart
        self._batches = self._jobs = 0  # so far
        # A launcher dies with the thread that started it, and a caller's thread may end before the ranks.
        self._starter = ThreadPoolExecutor(1)
        document = {"ranks": dataclasses.asdict(ranks), "groups": groups}
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
        verb: str,
        worker: str,
        jobs: list[dict[str, Any]],
        outputs: list[Path],
        *,
        on_result: Callable[[int, dict[str, Any]], None],
        on_progress: Callable[[int, str, int, int], None],
    ) -> list[dict[str, Any]]:
        """Returns the result of every job, in order; starts dead groups again first. `on_result` gets each as it comes.

        A job that no rank group finished gets the error of a group that failed. An exception, such as
        KeyboardInterrupt, ends all ranks and leaves no half-written file.
        """
        self._start_missing()
        first, number = self._jobs, self._batches
        document = {"verb": verb, "worker": worker, "first": first, "jobs": jobs}
        # A batch that is not written has no number.
        replace_text(self._folder / batch_file(number), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        self._jobs, self._batches = first + len(jobs), number + 1
        results: dict[int, dict[str, Any]] = {}
        seen: dict[int, dict[str, Any]] = {}
        indices = range(first, self._jobs)
        try:
            while True:
                dead = self._dead()
                for index in _collect(self._folder, indices, results):
                    on_result(index - first, results[index])
                _follow(self._folder, self._numbers.values(), first, seen, on_progress)
                for index, error in self._lost([index for index in indices if index not in results], dead):
                    results[index] = failure(error)
                    on_result(index - first, results[index])
                if len(results) == len(jobs):
                    break
                time.sleep(_PAUSE_S)
        except BaseException:
            self.stop()
            raise
        finally:
            remove_partials(outputs, _ended_pids(_pids(self._folder, self._dead())))
        return [results[index] for index in indices]

    def cancel(self) -> None:
        """Ends each job of the current batch between two steps with CancelledError; the ranks keep running."""
        replace_text(self._folder / CANCEL / str(self._batches - 1), "")

    def close(self) -> None:
        """Asks the ranks to end, and stops ranks that do not."""
        try:
            replace_text(self._folder / CLOSE, "")
            ends = time.monotonic() + _GRACE_S
            while time.monotonic() < ends and any(launcher.poll() is None for launcher in self._launchers.values()):
                time.sleep(_PAUSE_S / 5)
        finally:
            self.stop()
            self._starter.shutdown()

    def stop(self) -> None:
        """Ends all launchers and their ranks at once."""
        for launcher in self._launchers.values():
            if launcher.poll() is None:
                launcher.terminate()
        ends = time.monotonic() + _GRACE_S
        for launcher in self._launchers.values():
            try:
                launcher.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                launcher.kill()  # its ranks die with it
                launcher.wait()

    def _start_missing(self) -> None:
        for place in range(self._groups):
            launcher = self._launchers.get(place)
            if launcher is None or launcher.poll() is not None:
                number = place if launcher is None else self._numbers[place] + self._groups
                self._numbers[place] = number
                self._launchers[place] = self._starter.submit(_start, self._folder, number, self._batches).result()

    def _dead(self) -> set[int]:
        """Returns the numbers of the groups whose launcher ended."""
        return {self._numbers[place] for place, launcher in self._launchers.items() if launcher.poll() is not None}

    def _lost(self, missing: list[int], dead: set[int]) -> Iterator[tuple[int, WanFastError]]:
        """Yields the missing jobs that no living group will do, each with the error of its group."""
        errors: dict[int, tuple[int, WanFastError]] = {}
        none_lives = len(dead) == self._groups
        for index in missing if dead else ():
            if none_lives or claimed_by(self._folder, index) in dead:
                errors = errors or {number: _error_of_group(self._folder, number, self._ranks) for number in dead}
                yield index, _error_of_job(self._folder, index, errors)


def _start(run_folder: Path, number: int, batch: int) -> subprocess.Popen[bytes]:
    """Starts the launcher of group `number`, whose ranks begin with batch `batch`."""
    command = [sys.executable, "-m", "wanfast.runtime.processes.elastic", str(run_folder), str(number)]
    file = run_folder / "logs" / f"launcher-{number}.log"
    with writing_to(file):
        log = file.open("wb")
    with log:
        # In a new session Ctrl-C does not reach the launcher: only this process gets Ctrl-C and then stops all.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {PARENT: str(os.getpid()), FIRST_BATCH: str(batch)},
        )


def _collect(run_folder: Path, indices: range, results: dict[int, dict[str, Any]]) -> list[int]:
    """Adds the new results to `results` and returns their indices."""
    files = {int(file.stem): file for file in (run_folder / RESULTS).glob("*.json")}
    new = [index for index in indices if index in files and index not in results]
    results |= {index: json.loads(files[index].read_text(encoding="utf-8")) for index in new}
    return new


def _follow(
    run_folder: Path,
    numbers: Iterable[int],
    first: int,
    seen: dict[int, dict[str, Any]],
    on_progress: Callable[[int, str, int, int], None],
) -> None:
    """Reports the progress of each group that differs from `seen`, for jobs from `first` on."""
    for number in numbers:
        file = run_folder / PROGRESS / f"{number}.json"
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if state and state != seen.get(number) and state["job"] >= first:
            seen[number] = state
            on_progress(state["job"] - first, state["stage"], state["done"], state["total"])


def _pids(run_folder: Path, numbers: Iterable[int]) -> list[int]:
    files = (file for number in numbers for file in (run_folder / RANKS).glob(f"{number}-*/pid"))
    return [int(file.read_text()) for file in files]


def _ended_pids(pids: list[int]) -> list[int]:
    """Returns `pids` when they have ended, or after 2 s: ranks live a little longer than a killed launcher."""
    ends = time.monotonic() + 2
    while time.monotonic() < ends and any(Path("/proc", str(pid)).exists() for pid in pids):
        time.sleep(0.02)
    return pids


def claimed_by(run_folder: Path, index: int) -> int | None:
    """Returns the number of the rank group that claimed a job; None if no group did."""
    claim = run_folder / CLAIMS / str(index)
    return int(claim.read_text()) if claim.exists() else None


def _error_of_job(run_folder: Path, index: int, errors: dict[int, tuple[int, WanFastError]]) -> WanFastError:
    """Returns the error of the group that claimed a job, or the earliest error if no group claimed it."""
    number = claimed_by(run_folder, index)
    if number in errors:
        return errors[number][1]
    return min(errors.values(), key=lambda found: found[0])[1]


def _error_of_group(run_folder: Path, replica: int, config: RanksConfig) -> tuple[int, WanFastError]:
    """Returns (nanoseconds since the epoch, the first cause of a group's failure), not the errors that it caused."""
    folder, logs = run_folder / RANKS, f"logs of all ranks in {run_folder / 'logs'}"
    agent = folder / f"{replica}.json"
    known = json.loads(agent.read_text()) if agent.exists() else {}
    noticed = agent.stat().st_mtime_ns if agent.exists() else sys.maxsize
    if "rendezvous" in known:
        message = f"--rdzv-endpoint {config.rdzv_endpoint}: the {config.nnodes} machines did not meet within"
        within = f"--rank-timeout {config.rank_timeout:g} s ({known['rendezvous']:.200})"
        return noticed, ConfigError(f"{message} {within}: start wanfast on each of them")
    left = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{replica}-*/error.json")]
    first = min(left, key=lambda error: error["time"], default=None)
    ended = _ended(known, left)
    aborted = ended is not None and ended[1] == -signal.SIGABRT  # NCCL's watchdog aborts ranks that wait
    timed_out = first is not None and first["kind"] == "timeout" and (ended is None or aborted)
    if timed_out or (aborted and _idle_s(folder, replica, known) > _MOST * config.rank_timeout):
        behind = ", ".join(map(str, _behind(folder, replica)))
        who = f"rank {behind}, which hangs" if behind else "each other"
        message = f"the ranks waited --rank-timeout {config.rank_timeout:g} s for {who}"
        return (first["time"] if first else noticed), RankFailedError(f"{message}; {logs}")
    if ended:
        rank, code = ended
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return noticed, RankFailedError(f"rank {rank} {how}; {logs}")
    if first is None:
        return noticed, RankFailedError(f"the launcher of rank group {replica} failed; {logs}")
    if first["kind"] == "user":
        return first["time"], from_failure(first)
    return first["time"], RankFailedError(f"rank {first['rank']} failed: {first['error']}; {logs}")


def _ended(known: dict[str, Any], left: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Returns (rank, exit code) of the first rank that ended without an error file; None if there is none.

    Such a rank closes its connections, which causes its peers' errors. Ranks that the agent stopped after a peer's
    failure do not count, nor ranks that ended over _OUTLIVED_S after a peer's error.
    """
    reported = {str(error["rank"]) for error in left}
    oldest = min((error["time"] / 1e9 for error in left), default=math.inf)
    by_agent = (-signal.SIGTERM, -signal.SIGKILL)
    silent = [
        (known["seconds"][rank], rank, code)
        for rank, code in known.get("exit_codes", {}).items()
        if rank not in reported and not (rank in known["stopped"] and code in by_agent)
    ]
    silent = [found for found in silent if found[0] - oldest <= _OUTLIVED_S]
    return min(silent, key=lambda found: found[0])[1:] if silent else None


def _idle_s(folder: Path, replica: int, known: dict[str, Any]) -> float:
    """Returns the seconds from the rank group's last step, or from its start, to its end."""
    signs = (file for name in ("pid", PROGRESS) for file in folder.glob(f"{replica}-*/{name}"))
    last = max((file.stat().st_mtime for file in signs), default=math.inf)
    return float(min(known["seconds"].values()) - last)


def _behind(folder: Path, replica: int) -> list[int]:
    """Returns the ranks with fewer steps than others; if all are equal, the ranks without an error file."""
    ranks = {int(pid.parent.name.split("-")[1]): pid.parent for pid in folder.glob(f"{replica}-*/pid")}
    done = {
        rank: json.loads(file.read_text())["done"] for rank, own in ranks.items() if (file := own / PROGRESS).exists()
    }
    slowest = sorted(rank for rank, steps in done.items() if steps < max(done.values()))
    return slowest or sorted(rank for rank, own in ranks.items() if not (own / "error.json").exists())


def _check_endpoint(config: RanksConfig) -> None:
    """Raises ConfigError if the port of machine 0 is taken, because the other machines would wait for their timeout."""
    if config.rdzv_endpoint is None or config.node_rank != 0:
        return
    if config.mesh.group_size <= config.num_gpus:
        return  # each machine makes separate videos
    host, port = config.rdzv_endpoint.rsplit(":", 1)
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--rdzv-endpoint {host}:{port}: {reason}: name a port that is free here") from None
