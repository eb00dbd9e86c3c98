"""Forks commands of a process that has imported torch, but nothing of a test, and that has run no test.

A launcher that is a fork of a test process may die of SIGBUS when its ranks lose their connections. Such a process is
started once, at the first command, and each command becomes a child of the test process itself.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import forked

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans below this process become its children
_STREAMS = ("p2cread", "c2pwrite", "errwrite")


class CleanPopen(forked.ForkedPopen):
    """Replaces `subprocess.Popen` for `python -m MODULE`, where ranks die."""

    def _fork(self, asked: dict[str, Any]) -> int:
        streams = [own if asked[name] == -1 else asked[name] for own, name in enumerate(_STREAMS)]
        order = asked | {"cwd": str(asked["cwd"] or Path.cwd()), "env": dict(asked["env"] or os.environ)}
        prctl, connection = ctypes.CDLL(None).prctl, _server()
        prctl(_SUBREAPER, 1)
        try:
            socket.send_fds(connection, [json.dumps(order).encode()], streams)
            return int(connection.recv(32))
        finally:
            prctl(_SUBREAPER, 0)


@functools.cache
def _server() -> socket.socket:
    """Starts the process that forks, which ends with this one, and returns the connection to it."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.clean", str(other.fileno())]
    _started.append(forked._RealPopen(command, pass_fds=[other.fileno()], cwd=Path(__file__).parents[1]))
    other.close()
    return own


_started: list[subprocess.Popen[bytes]] = []  # kept, because the end of such an object warns of a running process


def serve(connection: socket.socket) -> None:
    """Forks a process for each order, until the test process has ended."""
    gc.collect()
    gc.freeze()
    gc.enable()
    while True:
        content, streams, _, _ = socket.recv_fds(connection, 1 << 20, len(_STREAMS))
        if not content:
            return
        read, write = os.pipe()
        between = os.fork()
        if between == 0:  # whose end leaves its child to the test process
            pid = os.fork()
            if pid == 0:
                forked._become(json.loads(content) | dict(zip(_STREAMS, streams, strict=True)))
            os.write(write, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        connection.send(os.read(read, 32))
        for descriptor in (read, write, *streams):
            os.close(descriptor)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    serve(socket.socket(fileno=int(sys.argv[1])))
