"""Runs one rank of a group: `python -m wanfast.runtime.processes.worker RUN REPLICA`, which `elastic` starts.

Reads RUN/job.json, joins the group, works, and leaves what the parent watches: a result for each video, how far the
group is, and, if this rank fails, why. It ends at once on any signal: nothing here needs an orderly end, since the
parent removes what a dead rank left half-written.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.machine.signals import end_with_parent
from wanfast.runtime.planning.plan import Job
from wanfast.runtime.store.artifacts import CLAIMS, JOB, PROGRESS, RANKS, replace_text, write_result


def main(run_folder: Path, replica: int) -> None:
    end_with_parent()  # before torch, whose import takes seconds
    own_folder = run_folder / RANKS / f"{replica}-{os.environ['RANK']}"
    replace_text(own_folder / "pid", str(os.getpid()))

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Say why, and end before this process lets go of its connections: peers' echoes are younger than this."""
        replace_text(own_folder / "error.json", json.dumps(_told(error)))
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)  # torch may hold sys.stderr back
        os._exit(1)  # not by way of destructors, which may wait for peers that are gone

    sys.excepthook = leave
    try:
        _work(run_folder, replica, own_folder)
    except SystemExit as error:  # passes by the hook
        leave(type(error), error, error.__traceback__)


def _told(error: BaseException) -> dict[str, Any]:
    """The error for the parent: one line, and whether it is a user's, a wait in vain, or a bug."""
    import torch

    known = {"rank": int(os.environ["RANK"]), "time": time.time_ns()}
    if isinstance(error, torch.OutOfMemoryError):
        error = ConfigError("a GPU's memory does not suffice: take more GPUs, --dit-fsdp on, or a smaller --size")
    if isinstance(error, WanFastError):
        return {**known, "kind": "user", **failure(error)}
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    waited = isinstance(error, RuntimeError) and any(word in line.lower() for word in ("timed out", "timeout"))
    return {**known, "kind": "timeout" if waited else "bug", "error": line}


def _work(run_folder: Path, replica: int, own_folder: Path) -> None:
    from wanfast.runtime.distributed.ranks import rank_group  # torch begins here
    from wanfast.runtime.engine.session import Sessions

    document = json.loads((run_folder / JOB).read_text(encoding="utf-8"))
    config = Job.from_json(document["jobs"][0]).config.ranks
    mesh = dataclasses.replace(config.mesh, replica=1)  # this rank's group
    has_peers = config.num_gpus >= 2 * mesh.group_size and len(document["jobs"]) > 1
    with rank_group(config.device, mesh, config.rank_timeout) as ranks:
        # Of several machines the first one's jobs hold, down to the seed.
        jobs = ranks.lead(lambda: document["jobs"])

        def claim(index: int) -> bool:
            return ranks.lead(lambda: _claim(run_folder, index, replica))

        def progress(index: int, stage: str, done: int, total: int) -> None:
            state = json.dumps({"job": index, "stage": stage, "done": done, "total": total})
            replace_text(own_folder / PROGRESS, state)
            if ranks.is_leader:
                replace_text(run_folder / PROGRESS / f"{replica}.json", state)

        half, parsed = worker_half(document["worker"]), [Job.from_json(job) for job in jobs]
        for index, result in half(parsed, Sessions(ranks), claim=claim if has_peers else None, progress=progress):
            if int(os.environ["LOCAL_RANK"]) == 0:  # each machine has a run folder of its own
                write_result(run_folder, index, result)


def worker_half(module: str) -> Callable[..., Iterator[tuple[int, dict[str, Any]]]]:
    """What does a command's jobs: `run(jobs, sessions, claim=, progress=)`, which yields (index, result) of each.

    By the name of its module, since one of them lies above the runtime.
    """
    run: Callable[..., Iterator[tuple[int, dict[str, Any]]]] = importlib.import_module(module).run
    return run


def _claim(run_folder: Path, index: int, replica: int) -> bool:
    """True for the first rank group that asks for a job."""
    (run_folder / CLAIMS).mkdir(exist_ok=True)
    try:
        with (run_folder / CLAIMS / str(index)).open("x") as claim:
            claim.write(str(replica))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
