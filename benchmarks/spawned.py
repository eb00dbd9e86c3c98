"""Starts a benchmark's ranks on this machine, each a fresh process with torchrun's environment variables."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from wanfast.runtime.machine import host
from wanfast.runtime.processes.forks import leave


def on_ranks(work: Callable[[Namespace], None], options: Namespace) -> None:
    """Runs `work(options)` in `options.ranks` processes and waits until all end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.start_processes(_rank, (work, options, port), options.ranks, start_method="spawn")


def _rank(rank: int, work: Callable[[Namespace], None], options: Namespace, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(host.share_of_cores(options.ranks))  # else the ranks' threads wait for each other
    work(options)
    leave(0)  # as the ranks of a video
