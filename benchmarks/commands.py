"""Serves the benchmarks that run wanfast's commands: a model of random weights, signals, and hooks in processes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import torch.multiprocessing as mp

from wanfast.bench.model_folder import of_layers, random_bytes, write_model
from wanfast.runtime.machine import host

PICTURE = Path(__file__).parents[1] / "wanfast/assets/examples/cat.jpg"
KNOWN = "a cat"  # a prompt
SHARED_MEMORY = Path("/dev/shm")
SMOOTHNESS = 200  # x264 takes an eighth of its time for noise, as for a smooth clip: 3 s of two cores at 1280x720x81
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HOOKS = """
import contextlib, importlib.machinery, json, os, sys, time

def note(line):
    with open(os.environ["WANFAST_BENCHMARK_MARKS"], "a") as file:
        file.write(line + "\\n")

{own}

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            AFTER[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
for name in AFTER.keys() & sys.modules.keys():
    AFTER[name](sys.modules[name])
"""


def hooked(scratch: Path, own: str, *first: Path) -> dict[str, str]:
    """Returns environment variables with which each process of a command runs hooks after certain imports.

    `own`: code that defines AFTER = {name of a module: function that gets this module}. Its functions call
    `note(line)`, which adds a line to the file `scratch`/marks. `first`: folders from which the command imports before
    those of PYTHONPATH.
    """
    hooks = scratch / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(HOOKS.replace("{own}", own))
    return {
        "PYTHONPATH": os.pathsep.join((*map(str, (hooks, *first)), os.environ.get("PYTHONPATH", ""))),
        "WANFAST_BENCHMARK_MARKS": str(scratch / "marks"),
    }


def end_by_signals() -> None:
    """Lets a signal end this process through the clean-up, which a second signal does not disturb."""
    for ending in ENDINGS:
        signal.signal(ending, _leave)


def _leave(number: int, _: object) -> None:
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


def scratch_place(options: Namespace) -> Path:
    """Returns a folder in memory for random weights, if there is room; else one on a disk."""
    if options.random and SHARED_MEMORY.is_dir():
        room = min(shutil.disk_usage(SHARED_MEMORY).free, host.available_host_bytes() // 2)  # the ranks need some too
        wanted = random_bytes(of_layers(options.layers))
        if room >= wanted or options.folder:
            return SHARED_MEMORY
        print(f"{wanted / 1e9:.1f} GB of weights do not fit in memory: they are written to /var/tmp", file=sys.stderr)
    return Path("/var/tmp")  # /tmp may be memory, which holes occupy once read


def write_apart(folder: Path, options: Namespace) -> None:
    """Writes the model in a process of its own, because this one should not hold memory of a GPU."""
    given = {"is_random": options.random, "smoothness": SMOOTHNESS if options.random else 1}
    writer = mp.get_context("spawn").Process(target=write_model, args=(folder, of_layers(options.layers)), kwargs=given)
    writer.start()
    try:
        writer.join()
    finally:
        writer.kill()
        writer.join()
    if writer.exitcode:
        raise SystemExit(writer.exitcode)  # the process has printed its error
