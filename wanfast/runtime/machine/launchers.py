"""Detects that another launcher, such as torchrun, started this program several times, once for each rank."""

from __future__ import annotations

import os

from wanfast.runtime.errors import ConfigError

# (launcher, variable with the number of its processes, variable with the number of this one)
_LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


def refuse_launchers(what: str, instead: str, num_gpus: str) -> None:
    """Raises ConfigError if another launcher, such as torchrun, started this program once for each rank.

    Without this check, each of these processes would do all the work. Three texts go into the message. `what` names the
    program, such as "this command". `instead` says how to start it, such as "type `wanfast bench`". `num_gpus` is the
    option for the number of ranks, such as "--num-gpus "; the message appends the number.
    """
    for launcher, size, rank in _LAUNCHERS:
        count = os.environ.get(size, "1")
        if count.isdecimal() and int(count) > 1 and os.environ.get(rank, "").isdecimal():
            raise ConfigError(
                f"{launcher} started {what} {count} times ({size}={count}), but wanfast starts its own ranks: "
                f"{instead} without {launcher}, and give {num_gpus}{count} to get {count} ranks"
            )
