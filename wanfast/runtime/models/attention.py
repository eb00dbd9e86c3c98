"""One function computes scaled dot-product attention, so that models know neither the kernel nor where tokens are.

At 75,600 tokens self-attention is 72 % of all work (4 L^2 d a block, beside 45 TFLOP of linears). So the kernel decides
the speed of the program. In a compiled block every kernel is called through one opaque operator, so that the block
stays one graph with any kernel.
Shapes: B batch, L tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.models.attention_kernels import KERNELS, AttentionFn
from wanfast.runtime.models.operators import opaque


def attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v over all keys, unmasked: [B, Lq, H, D] in the dtype of q.

    Torch chooses the kernel. The function is differentiable: training uses it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by(kernel: str) -> AttentionFn:
    """Returns attention as computed by one of KERNELS; it is for inference, because it has no gradient."""
    return partial(_attention, kernel=kernel)


@opaque("wanfast::attention", shape=lambda q, k, v, kernel: q.new_empty(q.shape))
def _attention(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return KERNELS[kernel].run(q, k, v).contiguous()


class Projections(Protocol):
    """Computes queries, keys and values of this rank's tokens, when and in which parts of the heads they are needed."""

    def all(self) -> list[Tensor]:
        """Returns q, k and v, each [B, L, H, D]."""
        ...

    def by_heads(self, name: str, parts: int) -> Tensor:
        """Returns "q" or "k" as [parts, B, L, H / parts, D], dense."""
        ...

    def values(self, part: int, parts: int) -> Tensor:
        """Returns v of one of the `parts` of the heads: [B, L, H / parts, D], dense."""
        ...


class Sequence(Protocol):
    """Describes how ranks share the tokens of one forward pass, and how self-attention sees all of them."""

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's part of the tokens along `dim`; every rank's part has the same length."""
        ...

    @property
    def overlaps(self) -> bool:
        """Returns whether `attention` projects q, k and v one by one, each during the exchange of the one before."""
        ...

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        """Returns self-attention by `attend` of this rank's queries over all `num_tokens` tokens: [B, L, H, D]."""
        ...

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        """Returns all `num_tokens` tokens along `dim`, joined from every rank's part."""
        ...


class WholeSequence:
    """One rank holds all tokens, so nothing is exchanged."""

    @property
    def overlaps(self) -> bool:
        return False

    def shard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        return attend(*projections.all())

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        return x
