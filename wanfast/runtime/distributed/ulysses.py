"""Ulysses sequence parallelism: each rank holds a share of the tokens, and around attention a share of the heads.

Everything but self-attention treats tokens alone. For attention the P ranks exchange: [B, L/P, H, D] of own tokens and
all heads becomes [B, L, H/P, D] of all tokens and own heads, and back. v travels while q is worked out, q while k is,
which hides two of the four exchanges of a layer; 4 L d / P values leave a rank, P-1 of P parts of them. Tokens that P
does not divide are padded with zero rows at the end; padded keys are cut off before attention, so the result is that of
one rank.
Collectives are functional, so that a compiled block stays one graph.
Limit: P divides the heads. Source: DeepSpeed-Ulysses (arXiv 2309.14509) section 3.

Shapes: B batch, L tokens, N tokens with padding, P ranks, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.distributed.collectives import all_gather
from wanfast.runtime.models.attention import ProjectFn
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.tokens import packed


@dataclass(frozen=True)
class Ulysses:
    """The exchange over one process group; what a DiT takes as its `sequence`."""

    group: dist.ProcessGroup

    @property
    def overlaps(self) -> bool:
        return True

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of the L tokens along `dim`, N/P of them, the last padded with zeros."""
        size, rank = self.group.size(), self.group.rank()
        share = -(-x.shape[dim] // size)
        x = x.narrow(dim, min(rank * share, x.shape[dim]), min(share, max(0, x.shape[dim] - rank * share)))
        missing = share - x.shape[dim]
        return packed(F.pad(x, [0, 0] * (x.dim() - dim - 1) + [0, missing]) if missing else x)

    def attention(self, project: ProjectFn, num_tokens: int, attend: AttentionFn) -> Tensor:
        """Attention over all `num_tokens` tokens for this rank's N/P; [B, N/P, H, D] in and out."""
        sent = [self._exchange(self._by_heads(*project(name))) for name in "vqk"]
        all_v, all_q, all_k = (rearrange(parts, "P B l h D -> B (P l) h D") for parts in sent)
        out = attend(all_q, all_k[:, :num_tokens], all_v[:, :num_tokens])
        parts = self._exchange(rearrange(out, "B (P l) h D -> P B l h D", P=self.group.size()))
        return rearrange(parts, "P B l h D -> B l (P h) D")

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        """All tokens along `dim` on every rank, without the padding."""
        return torch.cat(list(all_gather(x, self.group)), dim).narrow(dim, 0, num_tokens)

    def _by_heads(self, x_BLHD: Tensor) -> Tensor:
        return rearrange(x_BLHD, "B l (P h) D -> P B l h D", P=self.group.size())

    def _exchange(self, parts: Tensor) -> Tensor:
        """parts[p] goes to rank p; the result's [p] came from rank p. It is waited for at its first use."""
        exchanged: Tensor = funcol.all_to_all_single(packed(parts), None, None, self.group)
        return exchanged
