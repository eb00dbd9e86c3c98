"""Ulysses sequence parallelism gives each rank a share of the tokens, and during self-attention a share of the heads.

Everything except self-attention processes each token separately. Before self-attention, the P ranks exchange q, k and v
by all-to-all. Before this exchange, a rank has its own tokens and all heads: [B, L/P, H, D]. After the exchange, the
rank has all tokens and its own heads: [B, L, H/P, D]. After self-attention, the ranks exchange the result back. q is
sent while k is computed, and k is sent while v is computed. v is computed in P parts, and each part is sent while the
next part is computed. So all exchanges overlap with computation, except the exchange after attention.
In each block, q, k, v and the result together have 4 L H D / P values on a rank. The rank sends (P-1)/P of these
values. If L is not a multiple of P, zero rows are added at the end of the tokens. Before attention, these rows are cut
off from keys and values, so that the result is the same as on one rank.
A compiled block uses torch's functional collectives, so that the block stays one graph.
Limit: H must be a multiple of P. Source: DeepSpeed-Ulysses (arXiv 2309.14509) section 3.

Shapes: B batch, L tokens, N tokens with padding, P ranks, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.distributed.collectives import all_gather
from wanfast.runtime.models.attention_fp8 import Fp8Heads, fp8_attention
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.projections import Fp8Projections, Projections
from wanfast.runtime.models.tokens import FP8, packed


@dataclass(frozen=True)
class Ulysses:
    """This class implements the DiT's `Sequence`: the ranks of one process group share the tokens."""

    group: dist.ProcessGroup

    @property
    def is_shared(self) -> bool:
        return True

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's share of the tokens of x; `dim` is the dimension of the tokens.

        Every share has the same length. If the tokens cannot be divided equally, zeros pad the shares of the last
        ranks.
        """
        share = -(-x.shape[dim] // self.group.size())
        x = x.narrow(dim, *self.own(x.shape[dim]))
        missing = share - x.shape[dim]
        return packed(F.pad(x, [0, 0] * (x.dim() - dim - 1) + [0, missing]) if missing else x)

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        """Returns the self-attention [B, n, H, D] of this rank's n tokens; they attend to the tokens of all ranks.

        n includes the padding of this rank. `projections` computes q, k and v of this rank's tokens. `num_tokens`: the
        number of tokens of all ranks, without padding. `attend`: the attention kernel.
        """
        sent = [self._send(projections.by_heads(name, self.group.size())) for name in "qk"]
        all_v = self._all_values(projections)
        all_q, all_k = (rearrange(wait(), "P B l h D -> B (P l) h D") for wait in sent)
        return self._returned(attend(all_q, all_k[:, :num_tokens], all_v[:, :num_tokens]))

    def fp8_attention(self, projections: Fp8Projections, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Computes the same as `attention`, but in float8, so that the ranks exchange half as many bytes as in bf16.

        Returns (the attention of this rank's tokens [B, n, H, D] without the constant of v, this constant [H, D]).

        The float8 values are the same as on a single rank, because all ranks use the same scales and the same means of
        k and v.
        """
        size, rank = self.group.size(), self.group.rank()
        sent = [self._send(projections.queries(size).view(torch.uint8))]
        # While q is sent, the ranks exchange sums and extremes of their k and v.
        found = projections.scaling(self.stack(projections.statistics(*self.own(num_tokens), num_tokens)))
        sent += [self._send(x.view(torch.uint8)) for x in projections.keys_and_values(found, size)]
        q, k, v = (rearrange(wait().view(FP8), "P B l h D -> B (P l) h D") for wait in sent)
        scales = found.scales.chunk(size, dim=1)[rank]  # of this rank's heads
        heads = Fp8Heads(q, k[:, :num_tokens], v[:, :num_tokens], scales)
        return self._returned(fp8_attention(heads, projections.dtype)), found.v_centre

    def own(self, num_tokens: int) -> tuple[int, int]:
        """Returns (the index of this rank's first token, how many tokens the rank has without padding)."""
        share = -(-num_tokens // self.group.size())
        first = min(self.group.rank() * share, num_tokens)
        return first, min(share, num_tokens - first)

    def stack(self, x: Tensor) -> Tensor:
        """Returns the x of all P ranks, in rank order: [P, ...]."""
        return all_gather(x, self.group)

    def _returned(self, out: Tensor) -> Tensor:
        """Exchanges the result for all tokens and this rank's heads for the result of its tokens and all heads."""
        wait = self._send(rearrange(out, "B (P l) h D -> P B l h D", P=self.group.size()))
        return torch.cat(list(wait()), dim=2)

    def _all_values(self, projections: Projections) -> Tensor:
        """Returns v of this rank's heads for all tokens [B, N, H/P, D]; a part is sent while the next is computed."""
        size, rank = self.group.size(), self.group.rank()
        waits = {}
        for step in range(1, size):
            to, source = (rank + step) % size, (rank - step) % size
            waits[source] = self._send(projections.values(to, size), to, source)
        own = projections.values(rank, size)
        return torch.cat([own if source == rank else waits[source]() for source in range(size)], dim=1)

    def gather(self, x: Tensor, dim: int, num_tokens: int) -> Tensor:
        """Joins the tokens of all ranks along `dim`, cuts off the padding, and returns the tokens on every rank."""
        return torch.cat(list(all_gather(x, self.group)), dim).narrow(dim, 0, num_tokens)

    def _send(self, x: Tensor, to: int | None = None, source: int | None = None) -> Callable[[], Tensor]:
        """Sends x[p] to each rank p, or x to one rank `to`; returns a function that waits for what this rank gets.

        That is the part from rank p at [p], or what the rank `source` sent. A compiled block waits where the function
        is called, too: torch's own functional exchange would wait at once.
        """
        ranks, functional = range(self.group.size()), torch.ops._c10d_functional
        rows = 1 if to is None else x.shape[0]
        sizes = ([rows if which in (None, p) else 0 for p in ranks] for which in (source, to))
        sent = functional.all_to_all_single(x.contiguous(), *sizes, self.group.group_name)
        return lambda: functional.wait_tensor(sent)
