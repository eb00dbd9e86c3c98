"""This module lists the attention kernels that the program can use: three packages and torch's own back ends.

A package is imported only when its kernel first runs, because each package is optional, and its import takes time.
Shapes: B batch, L tokens, H heads, D head dim. Sources: FlashAttention-2 (arXiv 2307.08691), FlashAttention-3 (arXiv
2407.08608). FlashAttention-4 is the successor of FlashAttention-3, written in CuTe DSL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanfast.runtime.machine.packages import ATTENTION_PACKAGES

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out, all [B, L, H, D]


@dataclass(frozen=True)
class Kernel:
    """Describes an attention kernel and the package that holds it; torch's own kernels have no package."""

    run: AttentionFn
    package: str | None = None
    modules: tuple[str, ...] = ()  # any one of them holds the kernel
    extra: str = ""  # the extra of wanfast that installs the package

    @property
    def is_installed(self) -> bool:
        return not self.modules or any(map(is_importable, self.modules))


def is_importable(module: str) -> bool:
    """Returns whether a module is installed, without importing the module.

    Only the package that contains the module is imported.
    """
    top, _, _ = module.partition(".")
    return find_spec(top) is not None and find_spec(module) is not None


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not is_importable("fa3_fwd_interface"):
        from flash_attn_interface import flash_attn_func  # the build from the authors' source

        result = flash_attn_func(q, k, v)  # older versions also return the log-sum-exp
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
    from fa3_fwd_interface import _flash_attn_forward

    out: Tensor = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, num_splits=1)[0]
    return out


def fa4(q: Tensor, k: Tensor, v: Tensor, **named: object) -> Tensor:
    """Computes attention by FlashAttention-4; `named` holds further arguments for `flash_attn_func`.

    Raises RuntimeError if FlashAttention-4 cannot compile its kernel.
    """
    from cutlass.base_dsl.common import DSLBaseError
    from flash_attn.cute import flash_attn_func

    try:
        out: Tensor = flash_attn_func(q, k, v, **named)[0]
    except DSLBaseError as error:  # the CuTe compiler's own class, which no caller catches
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


# Sorted by speed on Hopper at 75,600 tokens, fastest first (times: LOG.md): `auto` takes the first that is right here.
KERNELS: dict[str, Kernel] = {
    "fa3": Kernel(_fa3, *ATTENTION_PACKAGES["fa3"]),
    "fa4": Kernel(fa4, *ATTENTION_PACKAGES["fa4"]),
    "cudnn": Kernel(partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    "fa2": Kernel(_fa2, *ATTENTION_PACKAGES["fa2"]),
    "flash": Kernel(partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    "efficient": Kernel(partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    "math": Kernel(partial(_sdpa, SDPBackend.MATH)),
}
