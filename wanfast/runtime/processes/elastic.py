"""Runs one rank group under torchrun's own launcher: `python -m wanfast.runtime.processes.elastic RUN NUMBER`.

RUN is the run folder, and NUMBER the group's number. Each rank group has a separate launcher process, so that one
group's failure does not end the other groups. torchrun runs in the launchers, and not in the parent. So the parent
needs no torch, and the parent's main thread is free for the terminal. The launcher imports torch once, and then forks
the ranks. If a rank fails, torchrun's agent reports exit codes and times; the launcher writes both to
RUN/ranks/NUMBER.json.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.machine import gpus, host
from wanfast.runtime.machine.signals import PARENT, end_with_parent
from wanfast.runtime.processes.forks import Forked, fork, leave
from wanfast.runtime.processes.run_folder import RANKS, SETUP
from wanfast.runtime.store.artifacts import replace_text

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(run_folder: Path, number: int) -> int:
    """Runs rank group `number`, and returns the exit code for this process.

    The exit code is 0 if all ranks succeeded, and 5 if a rank failed or the ranks could not connect. The exit code is
    128 + n if this process got signal n.
    The ranks are forks of this process. In each fork, this function runs the rank, and then returns 0.
    """
    document = json.loads((run_folder / SETUP).read_text(encoding="utf-8"))
    config = RanksConfig(**document["ranks"])
    place = number % document["groups"]  # a restarted group has the same place
    processes = min(config.num_gpus, config.mesh.group_size)
    _set_environment(config, place, processes)
    gc.disable()  # the search for garbage takes a fifth of an import
    from wanfast.runtime.processes import worker  # numpy and torch read the environment when they are imported

    worker.import_all()
    ranks = fork(processes)
    gc.enable()
    if not ranks:
        worker.main(run_folder, number)
        return 0
    return _launch(run_folder, number, config, ranks)


def _launch(run_folder: Path, number: int, config: RanksConfig, ranks: list[Forked]) -> int:
    """Lets torchrun's agent start the forked ranks and watch them; `main` has the details."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def start(env: dict[str, str], stdout: IO[str], stderr: IO[str], **others: object) -> Forked:
        rank = ranks[int(env["LOCAL_RANK"])]
        rank.start(env, stdout, stderr)
        return rank

    subprocess_handler.Popen = start  # type: ignore[attr-defined, assignment]  # the agent accepts no other class
    spans_machines = config.nnodes > 1
    # Several machines have given ranks, so that the first one has the leader; on one machine any free port will do.
    launch = LaunchConfig(
        min_nodes=config.nnodes if spans_machines else 1,
        max_nodes=config.nnodes if spans_machines else 1,
        nproc_per_node=len(ranks),
        run_id="wanfast" if spans_machines else f"{run_folder.name}-{number}",
        rdzv_backend="static" if spans_machines else "c10d",
        rdzv_endpoint=config.rdzv_endpoint or "" if spans_machines else "localhost:0",
        rdzv_configs={"rank": config.node_rank, "timeout": int(config.rank_timeout)} if spans_machines else {},
        max_restarts=0,
        monitor_interval=0.02,  # so that the end of a rank is soon noticed
        logs_specs=DefaultLogsSpecs(log_dir=str(run_folder / "logs"), redirects=Std.ALL),
        local_addr=None if spans_machines else "127.0.0.1",
    )
    if not spans_machines:
        _meet_at_once()
    failed: dict[str, Any]
    signals = _signals_of_the_agent()
    try:
        elastic_launch(launch, "wanfast.runtime.processes.worker")()  # a name for the logs
        return 0
    except ChildFailedError as error:
        failed = {
            "exit_codes": {str(rank): child.exitcode for rank, child in error.failures.items()},
            "seconds": {str(rank): child.timestamp for rank, child in error.failures.items()},
            "stopped": [str(rank) for rank, child in error.failures.items() if _was_stopped(child, signals)],
        }
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except (DistError, TimeoutError) as error:
        failed = {"rendezvous": str(error).strip().splitlines()[0]}
    replace_text(run_folder / RANKS / f"{number}.json", json.dumps(failed))
    return 5


def _meet_at_once() -> None:
    """Removes the random delay of up to 0.3 s, by which the agents of many machines do not all start together.

    The agent of a group on one machine meets no other agent.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous, utils

    def pause(seconds: float | tuple[float, float]) -> None:
        if not isinstance(seconds, tuple):  # a tuple is a range, from which torch draws the seconds
            utils._delay(seconds)

    dynamic_rendezvous._delay = pause  # type: ignore[attr-defined]  # torch has no option for it


def _was_stopped(child: ProcessFailure, signals: Mapping[int, Collection[int]]) -> bool:
    """Returns whether a rank ended by a signal that the agent sent it after a peer's failure.

    A killed rank closes its connections before it has ended. So the agent may notice a peer's failure first, and then
    signal the killed rank too, which ended by another signal.
    """
    return -child.exitcode in signals.get(child.pid, ())


def _signals_of_the_agent() -> dict[int, list[int]]:
    """Returns a mapping that is filled with the signals that the agent sends to each process id after a failure.

    The agent's report mixes their exit codes with the others, and its whole seconds do not show which rank ended first.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    signals: dict[int, list[int]] = {}
    close = SubprocessHandler.close

    def noted(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        signals.setdefault(self.proc.pid, []).append(death_sig or signal.SIGTERM)
        close(self, death_sig)

    SubprocessHandler.close = noted  # type: ignore[method-assign]  # the launcher accepts no other class
    return signals


def _set_environment(config: RanksConfig, place: int, processes: int) -> None:
    """Sets the ranks' parent, GPUs and fair share of the cores, none of which torchrun's API sets."""
    os.environ[PARENT] = str(os.getpid())
    if config.device == "cuda":
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that nothing uses a GPU before the ranks are forked
        ids = gpus.device_ids() or [str(index) for index in range(config.num_gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids[place * processes : (place + 1) * processes])
        gpus.set_environment()
    if config.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may resolve to an address that does not exist
    share = host.share_of_cores(config.num_gpus)
    if config.num_gpus > 1:  # else torch's own default: compiled code is stored for one number of threads
        os.environ.setdefault(host.THREADS, str(share))
    # These "threads" are processes, which torch starts for every rank; its default is 32 at most.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, share)))


if __name__ == "__main__":
    end_with_parent()  # effective until the launcher handles signals itself
    leave(main(Path(sys.argv[1]), int(sys.argv[2])))
