"""Runs work on the ranks of a rank group: real processes over gloo, forked, which takes a tenth of a second."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.multiprocessing as mp

from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.facts.mesh import Mesh

T = TypeVar("T")


def on_ranks(mesh: Mesh, work: Callable[[Ranks], T], timeout_s: float = 60) -> list[T]:
    """Returns what `work` returns on each rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with tempfile.TemporaryDirectory() as folder:

        def rank_main(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(mesh.group_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            with rank_group("cpu", mesh, timeout_s) as ranks:
                torch.save(work(ranks), Path(folder) / str(rank))

        mp.start_processes(rank_main, nprocs=mesh.group_size, start_method="fork")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(mesh.group_size)]
