"""Compiles blocks without Inductor, and lets forks of a test process begin as one that has compiled before."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from wanfast.runtime.engine import compilation
from wanfast.runtime.models.dit import WanDiT


@functools.cache
def compile_before() -> None:
    """Compiles a first graph: each fork that does not find its imports and tables takes half a second for them."""
    torch.compile(torch.nn.Linear(3, 3), backend="eager", fullgraph=True)(torch.ones(1, 3))


def compiler(monkeypatch: pytest.MonkeyPatch, module: Any) -> CompileCounterWithBackend:
    """Makes `module` compile blocks by a backend that counts its graphs, and imports no Inductor for it."""
    counter = CompileCounterWithBackend("eager")

    def compiled(model: WanDiT, mode: str) -> None:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=counter)

    monkeypatch.setattr(module, "compile_blocks", compiled)
    monkeypatch.setattr(compilation, "_import_compiler", lambda gpu: None)
    compilation.make_traceable()
    compile_before()
    torch._dynamo.reset()
    return counter
