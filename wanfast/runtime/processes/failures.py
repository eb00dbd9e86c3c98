"""Finds out why a rank group died, from the files that its ranks and its launcher left.

This module does not import torch.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, from_failure
from wanfast.runtime.planning.progress import LOADING, clip_of
from wanfast.runtime.processes.run_folder import PROGRESS, RANKS
from wanfast.runtime.processes.worker import MOST_OF_TIMEOUT

_OUTLIVED_S = 5.0  # a rank that ends this long after a peer's error did not cause it
_TOGETHER_S = 1.0  # errors this close to each other may be written in another order than they arose


def error_of_group(run_folder: Path, replica: int, config: RanksConfig) -> tuple[int, WanFastError]:
    """Returns why a rank group failed, as (the time in nanoseconds since the epoch, the error).

    `replica`: the number of the rank group. `config`: the options of the ranks. A rank that fails makes the other
    ranks of the group fail too; the returned error is that of the rank that failed first.
    """
    folder, logs = run_folder / RANKS, f"logs of all ranks in {run_folder / 'logs'}"
    agent = folder / f"{replica}.json"
    known = json.loads(agent.read_text()) if agent.exists() else {}
    noticed = agent.stat().st_mtime_ns if agent.exists() else sys.maxsize
    if "rendezvous" in known:
        message = f"--rdzv-endpoint {config.rdzv_endpoint}: the {config.nnodes} machines did not meet within"
        within = f"--rank-timeout {config.rank_timeout:g} s ({known['rendezvous']:.200})"
        return noticed, ConfigError(f"{message} {within}: start wanfast on each machine")
    left = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{replica}-*/error.json")]
    if not known:  # the launcher was killed, which also ends the exchanges of its ranks
        left = [error for error in left if error["kind"] != "exchange"]
    first = _first(left)
    ended = _ended(known, left)
    aborted = ended is not None and ended[1] == -signal.SIGABRT  # NCCL's watchdog aborts ranks that wait
    timed_out = first is not None and first["kind"] == "timeout" and (ended is None or aborted)
    if timed_out or (aborted and _idle_s(folder, replica, known) > MOST_OF_TIMEOUT * config.rank_timeout):
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


def _first(left: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the first error. A rank that gives up waiting closes its connections before it can write its error."""
    oldest = min((error["time"] for error in left), default=0)
    together = [error for error in left if error["time"] - oldest <= _TOGETHER_S * 1e9]
    return min(together, key=lambda error: (error["kind"] != "timeout", error["time"]), default=None)


def _ended(known: dict[str, Any], left: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Returns (rank, exit code) of the first rank that ended without an error file; None if there is none.

    Such a rank closes its connections, which causes its peers' errors. Ranks that the agent stopped after a peer's
    failure do not count, nor ranks that ended over _OUTLIVED_S after a peer's error.
    """
    reported = {str(error["rank"]) for error in left}
    oldest = min((error["time"] / 1e9 for error in left), default=math.inf)
    silent = [
        (known["seconds"][rank], rank, code)
        for rank, code in known.get("exit_codes", {}).items()
        if rank not in reported and rank not in known["stopped"]
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
    done = {rank: _place(file) for rank, own in ranks.items() if (file := own / PROGRESS).exists()}
    slowest = sorted(rank for rank, place in done.items() if place < max(done.values()))
    return slowest or sorted(rank for rank, own in ranks.items() if not (own / "error.json").exists())


def _place(file: Path) -> tuple[int, int, int]:
    """Returns how far a rank is: (the job, the clip, the steps of the clip)."""
    state = json.loads(file.read_text())
    return state["job"], clip_of(state["stage"])[0], state["done"]


def was_loading(run_folder: Path, number: int) -> bool:
    """Returns whether rank group `number` died before its first job, or while it loaded the models of a job."""
    file = run_folder / PROGRESS / f"{number}.json"
    return not file.exists() or json.loads(file.read_text(encoding="utf-8"))["stage"] == LOADING
