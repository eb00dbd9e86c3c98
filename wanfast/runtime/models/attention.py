"""This module computes scaled dot-product attention, with any kernel and any distribution of tokens over ranks.

At 75,600 tokens, self-attention takes 72 % of all FLOP. In each block, self-attention takes 4 L^2 d = 117 TFLOP (the
model dim d is 5120), and the linear layers take 45 TFLOP. So the kernel decides the speed of the program. A compiled
block calls every kernel through one opaque operator, so that the block stays one graph with any kernel.
Shapes: B batch, L tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.models.attention_fp8 import Fp8Heads, fp8_attention
from wanfast.runtime.models.attention_kernels import KERNELS, AttentionFn
from wanfast.runtime.models.operators import opaque
from wanfast.runtime.models.projections import Fp8Projections, Projections


def attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v over all keys, without a mask.

    The result has the shape [B, L, H, D] and the dtype of q. torch chooses the kernel. The function is differentiable,
    so that training can use it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by(kernel: str) -> AttentionFn:
    """Returns a function that computes attention without gradients, by the kernel named `kernel` in KERNELS."""
    return partial(_attention, kernel=kernel)


@opaque("wanfast::attention", shape=lambda q, k, v, kernel: q.new_empty(q.shape))
def _attention(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return KERNELS[kernel].run(q, k, v).contiguous()


class HeadOrder(NamedTuple):
    """Holds the order in which the ranks of Ulysses share the heads: the first rank gets the order's first heads.

    Without a HeadOrder, the ranks share the heads in the model's order.
    """

    order: Tensor  # [H]: numbers of heads, those of the first rank first
    inverse: Tensor  # [H]: the place of each head in `order`

    @classmethod
    def of(cls, heads: tuple[int, ...], device: str) -> HeadOrder:
        order = torch.tensor(heads, device=device)
        return cls(order, order.argsort())

    def grouped(self, x_BLHD: Tensor, parts: int) -> Tensor:
        """Returns x in this order, with the heads divided into `parts` equal groups: [parts, B, L, H / parts, D]."""
        B, L, H, D = x_BLHD.shape
        out = x_BLHD.new_empty(parts, B, L, H // parts, D)
        for part, into in enumerate(out):  # one pass over the values
            torch.index_select(x_BLHD, 2, self.part(part, parts), out=into)
        return out

    def part(self, part: int, parts: int) -> Tensor:
        """Divides the order into `parts` equal groups, and returns the numbers of the heads in group `part`.

        Groups and heads count from 0.
        """
        return self.order.chunk(parts)[part]

    def restored(self, x_BLHD: Tensor) -> Tensor:
        """Takes x in this order, and returns x in the model's order of heads."""
        return x_BLHD.index_select(2, self.inverse)


class Sequence(Protocol):
    """This interface splits the tokens of a forward over ranks, and computes self-attention over all tokens."""

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Divides the tokens, which lie along `dim` of x, among the ranks; returns this rank's part.

        The parts of all ranks have the same length; zeros pad the parts of the last ranks if necessary.
        """
        ...

    @property
    def is_shared(self) -> bool:
        """Returns whether several ranks share the tokens.

        Then `attention` requests q, k and v in separate calls, to send q to the other ranks while k is computed.
        """
        ...

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        """Returns the attention [B, L, H, D] of this rank's queries to the tokens of all ranks.

        `attend` computes the attention. `num_tokens` is the number of tokens of all ranks together.
        """
        ...

    def fp8_attention(self, projections: Fp8Projections, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Computes the same attention as the method `attention`, but in float8; ranks exchange float8 values.

        Returns (the attention of this rank's queries [B, L, H, D] without a constant, the constant [H, D]). The
        attention is the sum of both.
        """
        ...

    def own(self, num_tokens: int) -> tuple[int, int]:
        """Returns (the index of this rank's first token, the number of this rank's tokens, not counting padding)."""
        ...

    def stack(self, x: Tensor) -> Tensor:
        """Returns the tensors x of all P ranks as one tensor [P, ...], in rank order."""
        ...

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        """Returns the tokens of all ranks, joined along `dim` of x; `num_tokens` is their total number."""
        ...


class WholeSequence:
    """This class implements `Sequence` for a single rank, which holds all tokens and exchanges nothing."""

    @property
    def is_shared(self) -> bool:
        return False

    def shard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        return attend(*projections.all())

    def fp8_attention(self, projections: Fp8Projections, num_tokens: int) -> tuple[Tensor, Tensor]:
        q = projections.queries(1)[0]
        found = projections.scaling(self.stack(projections.statistics(0, num_tokens, num_tokens)))
        k, v = (x[0] for x in projections.keys_and_values(found, 1))
        return fp8_attention(Fp8Heads(q, k, v, found.scales), projections.dtype), found.v_centre

    def own(self, num_tokens: int) -> tuple[int, int]:
        return 0, num_tokens

    def stack(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        return x
