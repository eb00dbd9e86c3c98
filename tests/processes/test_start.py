"""Tests what the start of a command costs: which parts of torch a plain run does not import, and how ranks start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes.test_launch import SMALL, Start, start, with_fault

__all__ = ["start"]

HEAVY = ("sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
PLAIN_RUN = f"""
import importlib, sys
from wanfast.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
for kernels in ("fused_kernels", "int8_kernel", "router_kernel", "vae_kernels"):  # what a GPU build imports too
    importlib.import_module(f"wanfast.runtime.models.{{kernels}}")
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_a_plain_run_imports_no_compiler_and_no_sharding(workdir: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PLAIN_RUN, "generate", *SMALL, "--steps=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_nor_does_a_rank_of_several(start: Start, workdir: Path) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: open("imported", "w").write(str([name for name in {HEAVY} if name in sys.modules])))
"""
    environment = with_fault(workdir, code, rank=1)
    mesh = ("--steps=1", "--num-gpus=2", "--cfg-parallel=1", "--ulysses=2")
    code, _, err = start(*SMALL, *mesh, environment=environment, forked=False).end()
    assert code == 0, err
    assert (workdir / "imported").read_text() == "[]"


def test_a_fork_of_a_test_process_has_no_log_of_pytest(forked: None) -> None:
    """Such a log kept its number, and its lines went into another file or pipe, so that a compiler waited forever."""
    code = "import logging; print(logging.root.handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
