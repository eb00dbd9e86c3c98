"""Makes a process of a run end with its parent, and immediately on a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "WANFAST_PARENT"  # environment variable: the process id of the parent

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent() -> None:
    """Makes this process end with its parent, and immediately on SIGINT or SIGTERM, even if it hangs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("the parent process is gone")
