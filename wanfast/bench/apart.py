"""Runs work that needs torch in a separate process, so that the parent process holds no GPU memory.

The process is `python -m wanfast.bench.work NAME FILE`. At first, FILE holds the arguments as JSON. At the end, FILE
holds the result or the error.
This module does not import torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from wanfast.runtime.errors import RankFailedError, from_failure
from wanfast.runtime.machine.signals import PARENT
from wanfast.runtime.processes.launch import child_environment

WorkName = Literal["quantize", "random_model", "compare"]


def apart(work: WorkName, **arguments: Any) -> Any:
    """Calls a function of `wanfast.bench.work` in a new process, and returns the function's result.

    `work` is the function's name in `WORKS`. If the function raises a WanFastError, `apart` raises the same error.
    Raises RankFailedError if the new process dies. Ctrl-C reaches only the calling process, which then ends the new
    process.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.json"
        file.write_text(json.dumps(arguments), encoding="utf-8")
        command = [sys.executable, "-m", "wanfast.bench.work", work, str(file)]
        environment = child_environment() | {PARENT: str(os.getpid())}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
        if done.returncode:
            raise RankFailedError(
                f"the process that runs `{work}` for `wanfast bench` ended with code {done.returncode}: if an error is "
                "printed above, fix it; else look whether the machine has enough memory"
            )
        document = json.loads(file.read_text(encoding="utf-8"))
    if "error" in document:
        raise from_failure(document)
    return document["result"]
