"""Lets one run of the tests compile each of Inductor's C++ files once, even if caches are emptied meanwhile.

Files are named by their content. Inductor's own caches are not touched: Inductor only sees a fast compiler.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = "WANFAST_TESTS_COMPILED"  # in the environment: processes of one run share it
_REAL = "WANFAST_TESTS_CXX"
# A script of the repository: Inductor keeps precompiled headers by the compiler's path, and would keep more each run.
_COMPILER = Path(__file__).with_name("cached_g++")


def install() -> None:
    """Sets the compiler of this process and of those that it starts; call it before Inductor is imported."""
    if _FOLDER in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="wanfast-tests-")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # compiles no programs that try the processor's instructions
    os.environ |= {_FOLDER: folder, _REAL: os.environ.get("CXX", "g++"), "CXX": str(_COMPILER)}
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
