"""Tests that the first signal stops a process and the second one ends it: while it waits, nested, and in any order."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from wanfast.runtime.machine.signals import stopped_by_signals

INT, TERM = signal.SIGINT, signal.SIGTERM


@contextmanager
def process(body: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that prints "stopped" and "ended" at signals; `body` is what its main thread does."""
    code = (
        "import os, signal, threading, time\n"
        "from wanfast.runtime.machine.signals import stopped_by_signals\n"
        "def stop():\n    print('stopped', flush=True)\n"
        "with stopped_by_signals(stop, lambda: print('ended', flush=True)):\n"
        "    print('begun', flush=True)\n"
        f"    {body}\n"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout and started.stdout.readline() == "begun\n"
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize(("first", "second"), [*itertools.product((INT, TERM), repeat=2)])
def test_the_second_signal_ends_a_process_that_never_looks(first: int, second: int) -> None:
    """The main thread runs no bytecode: it waits for a lock that nobody frees, and any thread may get a signal."""
    with process("lock = threading.Lock(); lock.acquire(); lock.acquire()") as waits:
        assert waits.stdout
        waits.send_signal(first)
        assert waits.stdout.readline() == "stopped\n" and waits.poll() is None
        waits.send_signal(second)
        assert waits.stdout.readline() == "ended\n"
        assert waits.wait(timeout=10) == (130 if first == second == INT else 143)


@pytest.mark.parametrize("order", [(INT, TERM), (TERM, INT)])
def test_two_signals_at_the_same_time_have_one_exit_code(order: tuple[int, int]) -> None:
    with process("time.sleep(60)") as stopped:
        stopped.send_signal(signal.SIGSTOP)
        for number in order:
            stopped.send_signal(number)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.stdout and stopped.stdout.read() == "stopped\nended\n"
        assert stopped.wait(timeout=10) == 143


def test_a_signal_that_comes_while_the_first_one_is_handled_is_the_second() -> None:
    code = (
        "import os, signal, time\n"
        "from wanfast.runtime.machine.signals import stopped_by_signals\n"
        "def stop():\n    os.kill(os.getpid(), signal.SIGTERM)\n    print('stopped', flush=True)\n"
        "with stopped_by_signals(stop):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (143, "stopped\n", "")


def test_the_first_signal_interrupts_nothing_and_the_handlers_come_back() -> None:
    before, stopped = [signal.getsignal(number) for number in (INT, TERM)], threading.Event()
    with stopped_by_signals(stopped.set):
        os.kill(os.getpid(), TERM)
        assert stopped.wait(10)
    assert [signal.getsignal(number) for number in (INT, TERM)] == before
    assert signal.set_wakeup_fd(-1) == -1 and "signals" not in {thread.name for thread in threading.enumerate()}
