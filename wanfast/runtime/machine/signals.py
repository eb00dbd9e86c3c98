"""How a process of a run ends: with its parent, and at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# In the environment of a process: the id of the one that started it, and the first batch of jobs that it does.
PARENT, FIRST_BATCH = "WANFAST_PARENT", "WANFAST_FIRST_BATCH"

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent() -> None:
    """This process dies with the one that started it, and at once on a signal, wherever it is stuck."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("the process that started this one is gone")
