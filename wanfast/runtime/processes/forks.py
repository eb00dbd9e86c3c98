"""Forks a launcher's ranks before torchrun's agent starts, so that all ranks share one import of torch.

A forked process has only the thread that called fork, and cannot use a GPU that its parent used before. torchrun's
agent starts threads and queries GPUs. So the launcher forks all ranks first, and each rank waits until the agent starts
this rank.
This module does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, NoReturn

from wanfast.runtime.machine.signals import end_with_parent

_PAUSE_S = 0.01


class Forked:
    """This class represents a forked rank that waits until `start` is called.

    torchrun's agent expects a `subprocess.Popen`. The class has those methods of `Popen` that the agent calls.
    """

    def __init__(self, pid: int, orders: int) -> None:
        """`orders`: the end of a pipe to which `start` writes."""
        self.pid, self.orders = pid, orders
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def start(self, environment: Mapping[str, str], stdout: IO[str], stderr: IO[str]) -> None:
        """Starts the waiting rank with this environment and these output files; does nothing if the rank has died."""
        changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        with contextlib.suppress(BrokenPipeError), os.fdopen(self.orders, "w") as pipe:
            json.dump({"environment": changed, "files": [stdout.name, stderr.name]}, pipe)

    def poll(self) -> int | None:
        """Returns the rank's exit code, or None while it runs. The code is -N if the signal N ended the rank."""
        with self._lock:  # of two threads that ask at once, only one gets the status
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        """Waits until the rank has ended, and returns its exit code. Raises TimeoutExpired after `timeout` seconds."""
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(_PAUSE_S)
        return code


def fork(count: int) -> list[Forked]:
    """Forks `count` ranks and returns them.

    In each rank, this function waits until the launcher calls `Forked.start`, and then returns an empty list.
    """
    gc.freeze()  # what was imported is neither searched for garbage, nor copied by the search
    forked: list[Forked] = []
    for _ in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            for end in (write, *(other.orders for other in forked)):
                os.close(end)
            _become_rank(read)
            return []
        os.close(read)
        forked.append(Forked(pid, write))
    return forked


def leave(code: int) -> NoReturn:
    """Runs the exit handlers, and then ends this process with the exit code `code`, without Python's usual shutdown.

    The usual shutdown destroys torch's objects. This takes half a second, and a thread of torch may crash the process
    during this time.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become_rank(orders: int) -> None:
    """Sets what the agent's own start of a process would set: session, environment, standard streams."""
    os.setsid()
    end_with_parent()
    with os.fdopen(orders) as pipe:
        text = pipe.read()
    if not text:
        sys.exit("the launcher started no rank")
    order = json.loads(text)
    os.environ.update(order["environment"])
    for descriptor, file in enumerate(order["files"], start=1):
        with open(file, "w", encoding="utf-8") as log:  # noqa: PTH123
            os.dup2(log.fileno(), descriptor)
