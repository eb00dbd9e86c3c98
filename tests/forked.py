"""Runs `python -m MODULE` and `python -c CODE` as forks of this process, which has imported torch already.

Such a process has an id, a session, an environment, pipes, signals and an exit code of its own, and the processes that
it starts are forked too, so that commands and launchers talk and die as they do when installed, and start in a tenth of
a second instead of seconds. Tests of the start itself use `subprocess.Popen`.

Torchrun's agent has threads, so its own fork could inherit a lock that one of them holds. Therefore a launcher first
forks a starter, a process without threads. The starter forks the ranks, and the launcher becomes their parent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import inspect
import logging
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests import compiler_cache

if torch.version.cuda is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this at import and then interprets its kernels on a CPU, slowly
compiler_cache.install()  # before the imports below, some of which import Inductor and Triton
for name in (
    "ftfy",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "wanfast.cli",
    "wanfast.runtime.engine.session",
    "wanfast.runtime.jobs.generate",
    "wanfast.runtime.processes.worker",
):
    importlib.import_module(name)  # once, for all processes to come

_RealPopen = subprocess.Popen
_SIGNATURE = inspect.signature(_RealPopen._execute_child)
_STREAMS = ("p2cread", "c2pwrite", "errwrite")  # the new process's stdin, stdout and stderr; -1 is the parent's own
REAL_RANKS = "WANFAST_TESTS_REAL_RANKS"  # in the environment: ranks import torch themselves, and read its variables
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


class ForkedPopen(_RealPopen):  # type: ignore[type-arg]
    """Replaces `subprocess.Popen`; programs other than this Python are started as always."""

    def _execute_child(self, *arguments: Any, **named: Any) -> None:
        asked = _SIGNATURE.bind(self, *arguments, **named).arguments
        words = asked["args"]
        if isinstance(words, str) or words[0] != sys.executable or not {"-m", "-c"} & set(words[1:3]):
            super()._execute_child(*arguments, **named)
            return
        self.pid = self._fork({name: asked[name] for name in ("args", "cwd", "env", "start_new_session", *_STREAMS)})
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))

    def _fork(self, asked: dict[str, Any]) -> int:
        """Returns the id of a fork that becomes the process that is asked for."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(asked)
        return pid


class _RankPopen(ForkedPopen):
    """Replaces `subprocess.Popen` in torchrun's agent: the starter forks, not the agent."""

    starter: socket.socket

    def _fork(self, asked: dict[str, Any]) -> int:
        _adopt_orphans(True)
        socket.send_fds(self.starter, [pickle.dumps(asked)], [asked[name] for name in _STREAMS if asked[name] != -1])
        pid = int(self.starter.recv(16))
        _adopt_orphans(False)
        return pid


def _adopt_orphans(on: bool) -> None:
    """Sets whether this process becomes the parent of descendants whose parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on))


@contextmanager
def _starter() -> Iterator[None]:
    """Provides a starter, which forks the ranks for the agent that this process runs meanwhile."""
    _RankPopen.starter, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _RankPopen.starter.close()
        _serve(requests)
    requests.close()
    subprocess_handler.Popen = _RankPopen  # type: ignore[misc]
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(requests: socket.socket) -> NoReturn:
    """Forks every rank that the launcher asks for, until the launcher has ended."""
    try:
        while (received := socket.recv_fds(requests, 1 << 18, len(_STREAMS)))[0]:
            message, descriptors = received[:2]
            between = os.fork()
            if between == 0:
                _fork_orphan(pickle.loads(message), descriptors, requests)
            os.waitpid(between, 0)
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        os._exit(0)


def _fork_orphan(asked: dict[str, Any], descriptors: list[int], requests: socket.socket) -> NoReturn:
    """Forks a rank and ends, so that the launcher adopts the rank."""
    between, received = os.getpid(), iter(descriptors)
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    os.setsid()
    requests.send(str(os.getpid()).encode())
    _become(asked | {name: next(received) for name in _STREAMS if asked[name] != -1} | {"start_new_session": False})


def _become(asked: dict[str, Any]) -> NoReturn:
    """Runs the process that is asked for in this fork."""
    code = 70
    try:
        _prepare(asked)
        code = _run(list(asked["args"][1:]))
    finally:
        os._exit(code)


def _prepare(asked: dict[str, Any]) -> None:
    """Sets what `exec` and a new interpreter set: descriptors, session, folder, environment, signals, seeds."""
    faulthandler.disable()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in enumerate(asked[name] for name in _STREAMS):
        if descriptor != -1:
            os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if asked["start_new_session"]:
        os.setsid()
    if asked["cwd"]:
        os.chdir(asked["cwd"])
    if asked["env"] is not None:
        os.environ.clear()
        os.environ.update(asked["env"])
    random.seed()
    inspect.stack = lambda context=1: []  # by which the launcher names its callers in a log: seconds, with many modules
    subprocess.Popen = ForkedPopen  # type: ignore[misc]


def _run(words: Sequence[str]) -> int:
    """Returns the exit code of `python WORDS`."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as this process lives
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr
    sys.excepthook = lambda kind, error, trace: traceback.print_exception(kind, error, trace)
    kind, program, *arguments = words[1:] if words[0] == "-u" else words
    sys.argv = [kind, *arguments]
    try:
        try:
            for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
                if (Path(folder) / "sitecustomize.py").exists():
                    runpy.run_path(str(Path(folder) / "sitecustomize.py"))
            if kind == "-c":
                exec(program, {"__name__": "__main__"})
            else:
                sys.modules.pop(program, None)  # `runpy` would warn of it
                forks_ranks = program == "wanfast.runtime.processes.elastic" and REAL_RANKS not in os.environ
                with _starter() if forks_ranks else nullcontext():
                    runpy.run_module(program, run_name="__main__", alter_sys=True)
            return 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001 - a process ends with whatever ended it
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
