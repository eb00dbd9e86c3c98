"""Which attention kernels work here: each is run once on a small problem and compared with the formula in float64.

That a package imports says little: it may lack this GPU's kernels, or expect another layout or CUDA. What "runs" gave
the right numbers. Shapes: B batch, L tokens, H heads, D head dim.

Cost: a forward each; FlashAttention-4 compiles first, some ten seconds. Limit: a kernel that breaks the process's CUDA
context takes those after it along.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out, all [B, L, H, D]

SHAPE = (1, 256, 2, 128)  # the head dim of the A14B
BOUND = 0.01  # rounding to bf16 alone is 0.002 to 0.004
# What a kernel says on a machine, or in a version, that it was not made for.
_FAILURES = (RuntimeError, ImportError, OSError, AssertionError, TypeError, ValueError)


@dataclass(frozen=True)
class Kernel:
    """An attention kernel; without a `module` it is torch's own."""

    name: str
    run: AttentionFn
    module: str | None = None  # holds the kernel, and no other package has it
    package: str | None = None  # as pip knows it
    on_cpu: bool = False


@dataclass(frozen=True)
class Finding:
    """What came of a kernel, and why it did not run."""

    state: Literal["runs", "not installed", "fails"]
    relative_error: float | None = None
    reason: str | None = None


def probe_all(device: str) -> dict[str, Finding]:
    """Every kernel that could run on `device`; a package for GPUs that is installed is tried on a CPU too."""
    kernels = [kernel for kernel in KERNELS if kernel.module or kernel.on_cpu or device == "cuda"]
    return {kernel.name: probe(kernel, device) for kernel in kernels}


def probe(kernel: Kernel, device: str) -> Finding:
    """Run one kernel. Packages that are not there are not imported."""
    q, k, v = _problem()
    expected = _formula(q.double(), k.double(), v.double())
    try:
        if kernel.module and not _is_installed(kernel.module):
            return Finding("not installed", reason=f"pip install {kernel.package}")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains each back end that it does not take
            got = kernel.run(q.to(device), k.to(device), v.to(device)).cpu()
    except _FAILURES as error:
        return Finding("fails", reason=(str(error).strip().splitlines() or [type(error).__name__])[0])
    if got.shape != expected.shape:
        return Finding("fails", reason=f"its result is {list(got.shape)}, not {list(expected.shape)}")
    relative_error = float((got.double() - expected).norm() / expected.norm())
    if not relative_error <= BOUND:  # NaN too
        return Finding("fails", reason=f"its result is wrong: relative error {relative_error:.1g}, over {BOUND}")
    return Finding("runs", relative_error=relative_error)


def _problem() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).bfloat16() for _ in "qkv"]


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def _is_installed(module: str) -> bool:
    top, _, _ = module.partition(".")
    return find_spec(top) is not None and find_spec(module) is not None


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import _flash_attn_forward

    out: Tensor = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, num_splits=1)[0]
    return out


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from cutlass.base_dsl.common import DSLBaseError
    from flash_attn.cute import flash_attn_func

    try:
        out: Tensor = flash_attn_func(q, k, v)[0]
    except DSLBaseError as error:  # its compiler's errors have no kind but their own
        raise RuntimeError(str(error)) from error
    return out


def _fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


KERNELS = (
    Kernel("fa3", _fa3, module="fa3_fwd_interface", package="fa3-fwd"),
    Kernel("fa4", _fa4, module="flash_attn.cute", package="flash-attn-4"),
    Kernel("fa2", _fa2, module="flash_attn.flash_attn_interface", package="flash-attn"),
    Kernel("sdpa-cudnn", partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Kernel("sdpa-flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION), on_cpu=True),
    Kernel("sdpa-efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Kernel("sdpa-math", partial(_sdpa, SDPBackend.MATH), on_cpu=True),
)
