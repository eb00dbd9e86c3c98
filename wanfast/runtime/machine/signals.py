"""Makes processes end when their parent process ends or a signal comes.

In a server, the first signal calls a function that stops the server, and the second signal ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# In the environment of a process: the id of the one that started it, and the first batch of jobs that it does.
PARENT, FIRST_BATCH = "WANFAST_PARENT", "WANFAST_FIRST_BATCH"

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_ENDING = (signal.SIGINT, signal.SIGTERM)


def end_with_parent() -> None:
    """Makes this process end when its parent process ends.

    SIGINT and SIGTERM also end this process immediately, even while this process hangs.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("the parent process is gone")


@contextmanager
def stopped_by_signals(stop: Callable[[], None], before_end: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Makes the first SIGINT or SIGTERM call `stop`, and the second one end this process without clean-up.

    Only the main thread may enter the `with` block. `before_end` is called after the second signal, before the process
    ends. A separate thread calls `stop` and `before_end`. The exit code is 143 if one of the two signals is SIGTERM,
    otherwise 130.
    """
    # A thread reads the signals from a pipe, because Python runs handlers in the main thread, which may be blocked.
    # A second handler could interrupt the first one anywhere. An exception in a handler could interrupt a clean-up.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_obey, args=(reader, stop, before_end), name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(writer)
    before = {number: signal.signal(number, _noticed) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)
        thread.join()
        os.close(reader)


def _noticed(number: int, frame: FrameType | None) -> None:
    """Does nothing, because the interpreter has written the signal's number into the pipe already."""


def _obey(reader: int, stop: Callable[[], None], before_end: Callable[[], None]) -> None:
    """Reads the numbers of signals from a pipe until its other end is closed."""
    first: int | None = None
    while read := os.read(reader, 1):
        (number,) = read
        if number not in _ENDING:
            continue
        if first is not None:
            before_end()
            os._exit(128 + max(first, number))  # SIGTERM counts: two signals at the same time have no order
        first = number
        stop()
