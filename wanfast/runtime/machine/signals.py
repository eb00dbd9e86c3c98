"""Makes a child process end when its parent process ends, and immediately on SIGINT or SIGTERM."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# In the environment of a process: the id of the one that started it, and the first batch of jobs that it does.
PARENT, FIRST_BATCH = "WANFAST_PARENT", "WANFAST_FIRST_BATCH"

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent() -> None:
    """Makes this process end when its parent process ends.

    SIGINT and SIGTERM also end this process immediately, even while this process hangs.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("the parent process is gone")
