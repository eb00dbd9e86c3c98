"""torch.compile of the experts, a block at a time: one graph serves all blocks of both experts.

Inductor fuses what stands between the matrix products and attention: norms, modulation, rotation, gates, residuals. A
block is compiled whole (`fullgraph`: a break is an error, not a slow path) and for one shape (`dynamic=False`).
Cost: a minute or so the first time; later processes find the kernels in Inductor's cache on disk. `default` leaves the
products to cuBLAS; the two `max-autotune` modes time Triton's products against them, which takes many minutes.
"""

from __future__ import annotations

from wanfast.runtime.config import CompileMode
from wanfast.runtime.models.dit import WanDiT


def compile_blocks(model: WanDiT, mode: CompileMode) -> None:
    """From now on every block of the model runs compiled; the first forward compiles."""
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)
