"""The parent's side of several ranks: starts a launcher for each rank group, watches, and says what came of every job.

Everything that crosses between the processes is a small file in the run folder: results, progress, and what a rank left
when it failed. So the parent prints what is there, whoever died. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, failure, from_failure
from wanfast.runtime.machine.signals import PARENT
from wanfast.runtime.store.artifacts import CLAIMS, PROGRESS, RANKS, RESULTS
from wanfast.runtime.store.atomic import remove_partials

_PAUSE_S = 0.1
_GRACE_S = 8.0  # from being asked to stop until being killed
_OUTLIVED_S = 5.0  # a rank that ends so long after a peer's error is not its cause
_MOST = 0.8  # of --rank-timeout, without a step: it ran out, for the host runs a little ahead of its GPU


def run(
    run_folder: Path,
    config: RanksConfig,
    num_jobs: int,
    outputs: list[Path],
    *,
    on_result: Callable[[int, dict[str, Any]], None],
    on_progress: Callable[[int, str, int, int], None],
) -> list[dict[str, Any]]:
    """The result of every job of `run_folder`/job.json, in order, each told as it comes.

    A job that no rank group finished gets the error of the rank group that failed. Interrupted, it leaves no process.
    """
    groups = min(num_jobs, max(1, config.num_gpus // config.mesh.group_size))
    _check_endpoint(config)
    results: dict[int, dict[str, Any]] = {}
    seen: dict[int, dict[str, Any]] = {}
    try:
        with _launchers(run_folder, groups) as launchers:
            running = True
            while running:
                running = any(launcher.poll() is None for launcher in launchers)
                _collect(run_folder, results, on_result)
                _follow(run_folder, groups, seen, on_progress)
                time.sleep(_PAUSE_S if running else 0)
    finally:
        remove_partials(outputs, _gone(_pids(run_folder)))
    errors: dict[int, tuple[int, WanFastError]] = {}
    for index in (index for index in range(num_jobs) if index not in results):
        errors = errors or {replica: _error_of_group(run_folder, replica, config) for replica in range(groups)}
        results[index] = failure(_error_of_job(run_folder, index, errors))
        on_result(index, results[index])
    return [results[index] for index in range(num_jobs)]


@contextmanager
def _launchers(run_folder: Path, groups: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A launcher process for each rank group; when the block ends, none of them is left, nor a rank."""
    launchers = []
    (run_folder / "logs").mkdir(exist_ok=True)
    try:
        for replica in range(groups):
            command = [sys.executable, "-m", "wanfast.runtime.processes.elastic", str(run_folder), str(replica)]
            with (run_folder / "logs" / f"launcher-{replica}.log").open("wb") as log:
                # A session of its own: Ctrl-C reaches this process alone, which then stops all.
                launchers.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        env=os.environ | {PARENT: str(os.getpid())},
                    )
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


def _follow(
    run_folder: Path,
    groups: int,
    seen: dict[int, dict[str, Any]],
    on_progress: Callable[[int, str, int, int], None],
) -> None:
    """Tell what changed since it was `seen`."""
    for replica in range(groups):
        file = run_folder / PROGRESS / f"{replica}.json"
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if state and state != seen.get(replica):
            seen[replica] = state
            on_progress(state["job"], state["stage"], state["done"], state["total"])


def _pids(run_folder: Path) -> list[int]:
    return [int(file.read_text()) for file in (run_folder / RANKS).glob("*/pid")]


def _gone(pids: list[int]) -> list[int]:
    """Once they are: ranks whose launcher was killed outlive it by a moment."""
    ends = time.monotonic() + 2
    while time.monotonic() < ends and any(Path("/proc", str(pid)).exists() for pid in pids):
        time.sleep(0.02)
    return pids


def _error_of_job(run_folder: Path, index: int, errors: dict[int, tuple[int, WanFastError]]) -> WanFastError:
    """Of the rank group that took the job; if none did, because all had failed by then, of the first."""
    claim = run_folder / CLAIMS / str(index)
    if claim.exists() and (replica := claim.read_text()):
        return errors[int(replica)][1]
    return min(errors.values(), key=lambda found: found[0])[1]


def _error_of_group(run_folder: Path, replica: int, config: RanksConfig) -> tuple[int, WanFastError]:
    """(nanoseconds since the epoch, the rank's own error and not the echoes of its peers)."""
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
    aborted = ended is not None and ended[1] == -signal.SIGABRT  # as NCCL's watchdog does to the ranks that wait
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
    """(rank, exit code) of the first that ended without a word: its peers' errors are echoes, connections that close.

    But not of one that the agent stopped because a peer had failed, nor of one that outlived a peer's error.
    """
    told = {str(error["rank"]) for error in left}
    oldest = min((error["time"] / 1e9 for error in left), default=math.inf)
    by_agent = (-signal.SIGTERM, -signal.SIGKILL)
    alone = [
        (known["seconds"][rank], rank, code)
        for rank, code in known.get("exit_codes", {}).items()
        if rank not in told and not (rank in known["stopped"] and code in by_agent)
    ]
    alone = [found for found in alone if found[0] - oldest <= _OUTLIVED_S]
    return min(alone, key=lambda found: found[0])[1:] if alone else None


def _idle_s(folder: Path, replica: int, known: dict[str, Any]) -> float:
    """From the rank group's last step, or its start, to its end."""
    signs = (file for name in ("pid", PROGRESS) for file in folder.glob(f"{replica}-*/{name}"))
    last = max((file.stat().st_mtime for file in signs), default=math.inf)
    return float(min(known["seconds"].values()) - last)


def _behind(folder: Path, replica: int) -> list[int]:
    """The ranks that did fewer steps than others, or, where all did as many, said nothing when the others gave up."""
    ranks = {int(pid.parent.name.split("-")[1]): pid.parent for pid in folder.glob(f"{replica}-*/pid")}
    done = {
        rank: json.loads(file.read_text())["done"] for rank, own in ranks.items() if (file := own / PROGRESS).exists()
    }
    slowest = sorted(rank for rank, steps in done.items() if steps < max(done.values()))
    return slowest or sorted(rank for rank, own in ranks.items() if not (own / "error.json").exists())


def _check_endpoint(config: RanksConfig) -> None:
    """Where machines meet, the first one's port must be free: the others would wait for their timeout."""
    if config.rdzv_endpoint is None or config.node_rank != 0:
        return
    if config.mesh.group_size <= config.num_gpus:
        return  # each makes videos of its own
    host, port = config.rdzv_endpoint.rsplit(":", 1)
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--rdzv-endpoint {host}:{port}: {reason}: name a port that is free here") from None
