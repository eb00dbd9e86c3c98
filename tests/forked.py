"""Runs `python -m MODULE` and `python -c CODE` as forks of this process, which has imported torch already.

Such a process has an id, a session, an environment, pipes, signals and an exit code of its own, and the processes that
it starts are forked too, so that commands and launchers talk and die as they do when installed, and start in a tenth of
a second instead of seconds. Tests of the start itself use `subprocess.Popen`.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import inspect
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests import compiler_cache

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

from torch._inductor.async_compile import AsyncCompile  # noqa: E402 - after the installation of the cache

_RealPopen = subprocess.Popen
_SIGNATURE = inspect.signature(_RealPopen._execute_child)
_STREAMS = ("p2cread", "c2pwrite", "errwrite")  # the new process's stdin, stdout and stderr; -1 is the parent's own
LAUNCHER = "wanfast.runtime.processes.elastic"
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM, signal.SIGINT)
REAL_LAUNCHERS = "WANFAST_TESTS_REAL_LAUNCHERS"  # in the environment: launchers import torch, and so read its variables


class ForkedPopen(_RealPopen):  # type: ignore[type-arg]
    """Replaces `subprocess.Popen`; programs other than this Python are started as always."""

    def _execute_child(self, *arguments: Any, **named: Any) -> None:
        asked = _SIGNATURE.bind(self, *arguments, **named).arguments
        words = asked["args"]
        own = not isinstance(words, str) and words[0] == sys.executable and {"-m", "-c"} & set(words[1:3])
        if not own or (LAUNCHER in words and REAL_LAUNCHERS in os.environ):
            super()._execute_child(*arguments, **named)
            return
        self.pid = self._fork({name: asked[name] for name in ("args", "cwd", "env", "start_new_session", *_STREAMS)})
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:  # such as a test's timeout, which waiting would hide
            self.kill()
        super().__exit__(kind, *error)

    def _fork(self, asked: dict[str, Any]) -> int:
        """Returns the id of a fork that becomes the process that is asked for."""
        sys.stdout.flush()
        sys.stderr.flush()
        # Functions of `os.register_at_fork` ignore exceptions, also that of this process's handler of a signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            pid = os.fork()
            if pid == 0:
                _become(asked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid


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
    # It would close pytest's log file by its number, which may be that of another file by then, such as gloo's.
    atexit.unregister(logging.shutdown)
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
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
    AsyncCompile.pool.cache_clear()  # threads do not outlive a fork
    inspect.stack = lambda context=1: []  # by which the launcher names its callers in a log: seconds, with many modules
    subprocess.Popen = ForkedPopen  # type: ignore[misc]


def _run(words: Sequence[str]) -> int:
    """Returns the exit code of `python WORDS`."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as this process lives
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    logging.root.handlers.clear()  # pytest's: one writes to a number that may be another file by now
    for logger in logging.root.manager.loggerDict.values():
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
