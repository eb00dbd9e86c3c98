"""Scaled dot-product attention behind one function, so that the models never name a kernel, nor where tokens are.

At 75,600 tokens self-attention is 72 % of all work (4 L^2 d a layer against 45 TFLOP of linears): the choice of the
kernel here decides the speed of the program. Every kernel is called through one custom operator, whose shape the
compiler knows and whose inside it does not ask about, so that a compiled block stays one graph with any of them.
Shapes: B batch, L tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.models.attention_kernels import KERNELS, AttentionFn

ProjectFn = Callable[[str], list[Tensor]]  # "qkv", or "v" alone -> as many tensors [B, L, H, D] of this rank's tokens


def attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all keys, unmasked; [B, Lq, H, D] in the dtype of q. Torch chooses the kernel.

    Differentiable: training goes through here.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by(kernel: str) -> AttentionFn:
    """The same by one of KERNELS, for inference."""
    return partial(_attention, kernel=kernel)


@torch.library.custom_op("wanfast::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return KERNELS[kernel].run(q, k, v).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return q.new_empty(q.shape)


class Sequence(Protocol):
    """Where the tokens of one forward pass are, and how self-attention sees all of them."""

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of the tokens along `dim`; every rank's part has the same length."""
        ...

    @property
    def overlaps(self) -> bool:
        """q, k and v are asked for one by one, each while another is on its way."""
        ...

    def attention(self, project: ProjectFn, num_tokens: int, attend: AttentionFn) -> Tensor:
        """Self-attention by `attend` of this rank's queries over all `num_tokens` tokens, [B, L, H, D]."""
        ...

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        """All `num_tokens` tokens along `dim`, from every rank's part."""
        ...


class WholeSequence:
    """One rank holds all tokens: nothing to exchange."""

    @property
    def overlaps(self) -> bool:
        return False

    def shard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def attention(self, project: ProjectFn, num_tokens: int, attend: AttentionFn) -> Tensor:
        return attend(*project("qkv"))

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        return x
