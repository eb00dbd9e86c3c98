"""Tests what the start of a command costs: which parts of torch a plain run does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLAIN_RUN = """
import importlib, sys
from wanfast.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
for kernels in ("fused_kernels", "int8_kernel"):  # what a GPU build imports too
    importlib.import_module(f"wanfast.runtime.models.{kernels}")
print(sorted({"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"} & sys.modules.keys()))
"""


def test_a_plain_run_imports_no_compiler_and_no_sharding(workdir: Path) -> None:
    options = ("--model=tiny", "--image=cat.png", "--prompt=a cat", "--size=64x64", "--frames=5", "--steps=1")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PLAIN_RUN, "generate", *options, "--device=cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
