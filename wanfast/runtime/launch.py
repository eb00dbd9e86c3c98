"""The parent's side of several ranks: starts a launcher for each gang, watches, and says what came of every job.

Everything that crosses between the processes is a small file in the run folder: results, progress, and what a rank left
when it failed. So the parent prints what is there, whoever died. Torch-free.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanfast.runtime.artifacts import CLAIMS, PROGRESS, RANKS, RESULTS
from wanfast.runtime.atomic import remove_partials
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, failure, from_failure

_PAUSE_S = 0.1
_GRACE_S = 8.0  # from being asked to stop until being killed


def run(
    run_folder: Path,
    config: EffectiveConfig,
    num_jobs: int,
    outputs: list[Path],
    *,
    on_result: Callable[[int, dict[str, Any]], None],
    on_progress: Callable[[int, str, int, int], None],
) -> list[dict[str, Any]]:
    """The result of every job of `run_folder`/job.json, in order, each told as it comes.

    A job that no gang finished gets the error of the gang that failed. Interrupted, it leaves no process behind.
    """
    gangs = min(num_jobs, max(1, config.num_gpus // (config.cfg_parallel * config.ulysses)))
    _check_endpoint(config)
    results: dict[int, dict[str, Any]] = {}
    try:
        with _launchers(run_folder, gangs) as launchers:
            running = True
            while running:
                running = any(launcher.poll() is None for launcher in launchers)
                _collect(run_folder, results, on_result)
                _follow(run_folder, gangs, on_progress)
                time.sleep(_PAUSE_S if running else 0)
    finally:
        remove_partials(outputs, _pids(run_folder))
    errors: dict[int, tuple[int, WanFastError]] = {}
    for index in (index for index in range(num_jobs) if index not in results):
        errors = errors or {replica: _error_of_gang(run_folder, replica, config) for replica in range(gangs)}
        results[index] = failure(_error_of_job(run_folder, index, errors))
        on_result(index, results[index])
    return [results[index] for index in range(num_jobs)]


@contextmanager
def _launchers(run_folder: Path, gangs: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A launcher process for each gang; when the block ends, none of them is left, nor a rank."""
    launchers = []
    (run_folder / "logs").mkdir(exist_ok=True)
    try:
        for replica in range(gangs):
            command = [sys.executable, "-m", "wanfast.runtime.elastic", str(run_folder), str(replica)]
            with (run_folder / "logs" / f"launcher-{replica}.log").open("wb") as log:
                # A session of its own: Ctrl-C reaches this process alone, which then stops all.
                launchers.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                )
        yield launchers
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.terminate()
        ends = time.monotonic() + _GRACE_S
        for launcher in launchers:
            try:
                launcher.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                launcher.kill()  # and its ranks with it: they die with their parent
                launcher.wait()


def _collect(
    run_folder: Path, results: dict[int, dict[str, Any]], on_result: Callable[[int, dict[str, Any]], None]
) -> None:
    for file in sorted((run_folder / RESULTS).glob("*.json")):
        if (index := int(file.stem)) not in results:
            results[index] = json.loads(file.read_text(encoding="utf-8"))
            on_result(index, results[index])


def _follow(run_folder: Path, gangs: int, on_progress: Callable[[int, str, int, int], None]) -> None:
    for replica in range(gangs):
        file = run_folder / PROGRESS / f"{replica}.json"
        if file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            on_progress(state["job"], state["stage"], state["done"], state["total"])


def _pids(run_folder: Path) -> list[int]:
    return [int(file.read_text()) for file in (run_folder / RANKS).glob("*/pid")]


def _error_of_job(run_folder: Path, index: int, errors: dict[int, tuple[int, WanFastError]]) -> WanFastError:
    """Of the gang that took the job; if none did, because all had failed by then, of the first."""
    claim = run_folder / CLAIMS / str(index)
    if claim.exists():
        return errors[int(claim.read_text())][1]
    return min(errors.values(), key=lambda found: found[0])[1]


def _error_of_gang(run_folder: Path, replica: int, config: EffectiveConfig) -> tuple[int, WanFastError]:
    """(nanoseconds since the epoch, the rank's own error and not the echoes of its peers)."""
    folder, logs = run_folder / RANKS, f"logs of all ranks in {run_folder / 'logs'}"
    agent = folder / f"{replica}.json"
    known = json.loads(agent.read_text()) if agent.exists() else {}
    seen = agent.stat().st_mtime_ns if agent.exists() else sys.maxsize
    left = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{replica}-*/error.json")]
    if "rendezvous" in known:
        message = f"--rdzv-endpoint {config.rdzv_endpoint}: the {config.nnodes} machines did not meet within"
        return seen, ConfigError(f"{message} --rank-timeout {config.rank_timeout:g} s: start wanfast on each of them")
    # A rank that was killed outright says nothing; its peers only saw their connections close.
    killed = {rank: -code for rank, code in known.get("exit_codes", {}).items() if code < 0}
    for rank, number in killed.items():
        if number not in (signal.SIGTERM, signal.SIGABRT):
            name = signal.Signals(number).name
            return seen, RankFailedError(f"rank {rank} was killed by {name}; {logs}")
    if left:
        first = min(left, key=lambda error: error["time"])
        if first["kind"] == "user":
            return first["time"], from_failure(first)
        if first["kind"] == "timeout":
            silent = sorted(set(_ranks_here(folder, replica)) - {error["rank"] for error in left})
            waited = f"rank {first['rank']} waited --rank-timeout {config.rank_timeout:g} s"
            who = f" for rank {', '.join(map(str, silent))}, which hangs" if silent else ""
            return first["time"], RankFailedError(f"{waited}{who}; {logs}")
        return first["time"], RankFailedError(f"rank {first['rank']} failed: {first['error']}; {logs}")
    if killed:
        rank, number = next(iter(killed.items()))
        return seen, RankFailedError(f"rank {rank} was ended by {signal.Signals(number).name}; {logs}")
    for rank, code in known.get("exit_codes", {}).items():
        return seen, RankFailedError(f"rank {rank} ended with exit code {code} before it began; {logs}")
    return seen, RankFailedError(f"the launcher of gang {replica} failed; {logs}")


def _ranks_here(folder: Path, replica: int) -> list[int]:
    return [int(file.parent.name.split("-")[1]) for file in folder.glob(f"{replica}-*/pid")]


def _check_endpoint(config: EffectiveConfig) -> None:
    """On the first machine of several the port must be free: torchrun's rendezvous would wait for its timeout."""
    if config.rdzv_endpoint is None or config.node_rank != 0:
        return
    host, port = config.rdzv_endpoint.rsplit(":", 1)
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--rdzv-endpoint {host}:{port}: {reason}: name a port that is free here") from None
