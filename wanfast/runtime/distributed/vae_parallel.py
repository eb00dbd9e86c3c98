"""Shares the rows of each frame among the ranks of a rank group, for the VAE.

Each rank has some rows of the latent grid, and the pixel rows that belong to these latent rows. Before each spatial
convolution, neighbouring ranks exchange their border rows, so that the result is the same as on one rank. No tiles
overlap and nothing is blended. In an attention layer, each rank gathers the keys and values of the whole frame for its
own queries. Any number of ranks can share a frame. If there are more ranks than latent rows, the last ranks get no
rows. Some ranks may have one row more than others. A collective would need equal shapes, so tensors are sent from rank
to rank instead.

A rank that runs out of memory must not stop at once: its neighbours would wait in their next exchange, until
`--rank-timeout` is over (gloo) or NCCL's watchdog ends the process. So this rank still does all exchanges (`missed`):
it repeats its work on the meta device, which computes only shapes, and sends zeros of these shapes. Then all ranks drop
their results. If every rank that ran out of memory can evict weights, all ranks repeat the VAE's work. If one of these
ranks cannot evict any, all ranks raise the same error.
Any other error ends the rank and its whole rank group. An error of NCCL itself also ends them, even if NCCL ran out of
memory.

Shapes: B batch, C channels, T frames, h own rows, w columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from wanfast.runtime.distributed.collectives import as_bytes


class Exchanges:
    """Exchanges tensors with other ranks, and counts the exchanges in `done`."""

    done = 0

    def swap(self, sent: Mapping[int, Tensor], shapes: Mapping[int, torch.Size], like: Tensor) -> dict[int, Tensor]:
        """Sends `sent[peer]` to each peer, and returns {peer: received tensor} for the peers in `shapes`.

        The tensor from a peer has the shape `shapes[peer]`, and the dtype and device of `like`.
        """
        received = {peer: like.new_empty(shape) for peer, shape in shapes.items()}
        operations = [dist.P2POp(dist.isend, as_bytes(x.contiguous()), peer) for peer, x in sent.items()]
        operations += [dist.P2POp(dist.irecv, as_bytes(x), peer) for peer, x in received.items()]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        self.done += 1
        return received


class MissedExchanges(Exchanges):
    """Replaces `Exchanges` on a rank that ran out of memory: sends zeros, because other ranks wait for its tensors.

    The rank repeats its work on the meta device, which gives the shapes of the tensors. `done`: how many exchanges the
    rank did before it ran out of memory. The first `done` calls of `swap` send nothing, and the later calls send zeros.
    `device`: where the zeros lie.
    """

    def __init__(self, done: int, device: str) -> None:
        self._left_out, self._device = done, device

    def swap(self, sent: Mapping[int, Tensor], shapes: Mapping[int, torch.Size], like: Tensor) -> dict[int, Tensor]:
        if self._left_out:
            self._left_out -= 1
        else:
            zeros = {peer: torch.zeros(x.shape, dtype=x.dtype, device=self._device) for peer, x in sent.items()}
            super().swap(zeros, shapes, torch.empty(0, dtype=like.dtype, device=self._device))
        return {peer: like.new_empty(shape) for peer, shape in shapes.items()}


@dataclass(frozen=True)
class SplitRows:
    """This class implements the VAE's `Rows`: ranks share each frame, and rank i has `counts[i]` latent rows."""

    rank: int
    counts: tuple[int, ...]
    exchanges: Exchanges = field(default_factory=Exchanges, compare=False)
    halo = 1

    @classmethod
    def of(cls, rank: int, num_ranks: int, latent_rows: int) -> SplitRows:
        """Divides `latent_rows` rows among `num_ranks` ranks; two ranks' numbers of rows differ by at most one."""
        sharing = min(num_ranks, latent_rows)
        least, larger = divmod(latent_rows, sharing)
        return cls(rank, tuple(least + (index < larger) for index in range(sharing)))

    @property
    def has_part(self) -> bool:
        return self.rank < len(self.counts)

    def missed(self, device: str) -> SplitRows:
        """Returns a copy of this object for a rank that ran out of memory, so that the rank's peers do not wait.

        The rank runs its work again with this copy, but on the meta device. There, nothing is computed: the work only
        gives the shapes of all exchanges. The copy leaves out the exchanges that the rank has done already. In each
        later exchange, the copy sends zeros that lie on `device`.
        """
        return replace(self, exchanges=MissedExchanges(self.exchanges.done, device))

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's rows of x along `dim`.

        The length of x along `dim` must be a multiple of the number of latent rows.
        """
        scale = x.shape[dim] // sum(self.counts)
        return x.narrow(dim, scale * sum(self.counts[: self.rank]), scale * self.counts[self.rank])

    def fill(self, clip: Tensor) -> None:
        """Fills the first and the last row of a clip [B, C, T, h+2, w] with the border rows of the neighbouring ranks.

        At the upper or lower edge of a frame there is no neighbour: the row is filled with zeros.
        """
        edges = {self.rank - 1: (clip[..., 1, :], clip[..., 0, :]), self.rank + 1: (clip[..., -2, :], clip[..., -1, :])}
        neighbours = {peer: rows for peer, rows in edges.items() if 0 <= peer < len(self.counts)}
        sent = {peer: own for peer, (own, _) in neighbours.items()}
        received = self.exchanges.swap(sent, {peer: own.shape for peer, own in sent.items()}, clip)
        for peer, (_, halo) in edges.items():
            if peer in received:
                halo.copy_(received[peer])
            else:
                halo.zero_()

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Joins the rows of all ranks along `dim` and returns them; each rank that has rows must call this method."""
        peers = [peer for peer in range(len(self.counts)) if peer != self.rank]
        others = self.exchanges.swap(dict.fromkeys(peers, x), self._shapes(x, dim, peers), x)
        return self._joined(others, x, dim)

    def collect(self, x: Tensor, dim: int) -> Tensor | None:
        """Joins the rows of all ranks along `dim` and returns them on the leader; returns None on other ranks."""
        if self.rank:
            self.exchanges.swap({0: x}, {}, x)
            return None
        peers = range(1, len(self.counts))
        return self._joined(self.exchanges.swap({}, self._shapes(x, dim, peers), x), x, dim)

    def _shapes(self, x: Tensor, dim: int, peers: range | list[int]) -> dict[int, torch.Size]:
        scale = x.shape[dim] // self.counts[self.rank]
        shapes = {}
        for peer in peers:
            sizes = list(x.shape)
            sizes[dim] = scale * self.counts[peer]
            shapes[peer] = torch.Size(sizes)
        return shapes

    def _joined(self, others: Mapping[int, Tensor], x: Tensor, dim: int) -> Tensor:
        return torch.cat([x if peer == self.rank else others[peer] for peer in range(len(self.counts))], dim)
