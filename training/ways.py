"""Names the ways of compiling the experts' blocks for training.

Compiled blocks have computed wrong gradients on H200 GPUs, without an error and only in some batches (LOG.md). The
cause is not known. So `python3 -m training.compiled` compares these ways on the GPU that will train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Way:
    """Holds a backend of `torch.compile` (None: no compilation), and options of Inductor."""

    backend: str | None = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)


WAYS = {  # the fastest first, as far as is known
    "default": Way(),  # wrong on an H200, as without mix-order, split or persistent reductions
    "no_inplace": Way(inductor={"inplace_buffers": False}),
    "no_reuse": Way(inductor={"allow_buffer_reuse": False}),
    "timed": Way(inductor={"deterministic": False}),  # timings choose kernels, so a resumed run can differ
    "no_fusion": Way(inductor={"max_fusion_size": 1}),
    "none": Way(None),
    # These two say which part of compilation is wrong; they are not faster than none.
    "aot_eager_decomp_partition": Way("aot_eager_decomp_partition"),  # Inductor's decompositions, eager kernels
    "aot_eager": Way("aot_eager"),  # only the partition into forward and backward
}


def compile_blocks(experts: Sequence[nn.Module], way: str) -> None:
    """Lets the blocks of experts be compiled, in place; each number of tokens is compiled at its first batch."""
    chosen = WAYS[way]
    if chosen.backend is None:
        return
    torch._dynamo.config.recompile_limit = 64
    options: dict[str, Any] = {"options": chosen.inductor} if chosen.inductor else {}
    for expert in experts:
        for block in expert.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False, backend=chosen.backend, **options)
