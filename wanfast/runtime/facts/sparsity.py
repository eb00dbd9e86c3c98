"""This module counts the blocks that sparse attention computes, and the bytes of the block lists.

The tokens of a video are sorted into bricks (small boxes of the token grid). Each 128 successive tokens form a block.
Each block of queries attends only to the key blocks in its block list. All block lists of a head have the same length.
If heads have unequal densities, the heads are divided among the ranks of Ulysses so that all ranks compute nearly the
same number of blocks.
This module does not import torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.densities import FP8_SHARE, Densities, Density

BRICK = (2, 8, 8)  # frames, rows and columns of tokens
BLOCK = math.prod(BRICK)
_INDEX_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Says which calls of self-attention are sparse in one video, and how many blocks these calls compute."""

    num_blocks: int
    first_blocks: int  # the blocks that hold tokens of the given image's frame
    last_blocks: int  # the blocks that hold tokens of the last frame, if its image is given too; else 0
    bands: tuple[int, ...]  # the first step of each band
    # [band][layer]: of each head's lists; 0 if the head is in float8 and has no lists; None if the layer is dense
    lengths: tuple[tuple[tuple[int, ...] | None, ...], ...]
    num_steps: int
    dense_steps: int  # the first steps use dense attention
    dense_layers: int  # and so do the first layers of every step
    lists_every: int  # steps after which lists are made again

    @classmethod
    def of(
        cls,
        token_grid: tuple[int, int, int],
        *,
        densities: Densities,
        num_steps: int,
        dense_share: float,
        dense_layers: int,
        lists_every: int,
        has_last: bool = False,
    ) -> Sparsity:
        """Returns the sparsity for a (T, Y, X) grid of tokens.

        The first steps are dense in all layers; `dense_share` (0 to 1) is their share of all steps. The first
        `dense_layers` layers are dense in all steps. `densities` gives the densities of all other steps and layers. The
        block lists are made again every `lists_every` steps. `has_last`: whether the image of the last frame is given.
        Raises ConfigError if all steps or all layers would be dense.
        """
        dense_steps, num_layers = math.ceil(dense_share * num_steps - 1e-9), len(densities.by_band[0])
        if dense_steps >= num_steps:
            raise ConfigError(
                f"--dense-share {dense_share:g}: all {num_steps} steps would use dense attention: use a smaller share"
            )
        if dense_layers >= num_layers:
            raise ConfigError(
                f"--dense-layers {dense_layers}: all {num_layers} layers would use dense attention: use a smaller "
                "number"
            )

        # A layer is dense only if all its heads are; otherwise the lists of its dense heads hold all blocks.
        def lengths(heads: Sequence[Density]) -> tuple[int, ...] | None:
            if not any(heads):  # no density is 0
                return None
            shares = (1.0 if density is None else density for density in heads)
            return tuple(0 if share == "fp8" else list_length(share, token_grid, has_last=has_last) for share in shares)

        num_blocks, first_blocks, last_blocks = blocks_of(token_grid, has_last=has_last)
        return cls(
            num_blocks=num_blocks,
            first_blocks=first_blocks,
            last_blocks=last_blocks,
            bands=densities.bands,
            lengths=tuple(tuple(map(lengths, layers)) for layers in densities.by_band),
            num_steps=num_steps,
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            lists_every=lists_every,
        )

    @property
    def num_layers(self) -> int:
        return len(self.lengths[0])

    def band(self, step: int) -> int:
        """Returns the number of the band to which a step belongs; bands and steps count from 0."""
        return bisect.bisect_right(self.bands, step) - 1

    def listed(self, step: int, layer: int) -> tuple[int, ...] | None:
        """Returns for each head how many key blocks each of its block lists has; None if the step or layer is dense.

        A head in float8 has no block lists, so its number is 0. Steps and layers count from 0.
        """
        is_guarded = step < self.dense_steps or layer < self.dense_layers
        return None if is_guarded else self.lengths[self.band(step)][layer]

    @cached_property
    def has_fp8(self) -> bool:
        """Returns whether any head is in float8; the first steps and layers, which are always dense, do not count."""
        return any(0 in heads for heads in self._later_layers() if heads)

    def assigned(self, heads: tuple[int, ...], ranks: int) -> tuple[tuple[int, ...], ...]:
        """Returns, for each rank of Ulysses, the numbers of the rank's heads, counted from 0.

        `heads` holds, for each head, how many key blocks each of its block lists has; 0 means a head in float8.
        """
        return assigned(self._work(heads), ranks)

    def _work(self, heads: tuple[int, ...]) -> tuple[float, ...]:
        """Returns how many blocks take the time of each head."""
        return tuple(length or FP8_SHARE * self.num_blocks for length in heads)

    @property
    def longest(self) -> int:
        """Returns the number of key blocks in the longest block list of the video.

        The first `dense_steps` steps and the first `dense_layers` layers do not count. If any other layer is dense, the
        result is the number of all blocks.
        """
        return max(max(heads) if heads else self.num_blocks for heads in self._later_layers())

    @property
    def density(self) -> float:
        """Returns the mean share of blocks that heads compute in the steps and layers that may be sparse.

        The first `dense_steps` steps and the first `dense_layers` layers do not count. A head in float8 counts as the
        share FP8_SHARE, because it takes this share of a dense head's time.
        """
        shares = [*map(self._share, self._later_layers())]
        return math.fsum(shares) / len(shares)

    def _later_layers(self) -> list[tuple[int, ...] | None]:
        """Returns the lengths of the lists of all steps and layers that are not guarded."""
        steps = range(self.dense_steps, self.num_steps)
        return [self.listed(step, layer) for step in steps for layer in range(self.dense_layers, self.num_layers)]

    def _share(self, heads: tuple[int, ...] | None, ranks: int = 1) -> float:
        """Returns the mean share of blocks that the heads of a layer compute, on the rank with the largest share."""
        if heads is None:
            return 1.0
        work = self._work(heads)
        return ranks * _most_work(work, assigned(work, ranks)) / (len(heads) * self.num_blocks)

    def mean_density(self, forwards: Sequence[int], ulysses: Sequence[int]) -> float:
        """Returns the mean density of all calls of a video; a dense call has the density 1.

        `forwards` holds, for each step, the number of forwards that are not skipped. `ulysses` holds, for each step,
        the number of ranks that share the heads. If several ranks share the heads, the density of a call is that of its
        slowest rank, for which the others wait.
        """
        shares = [
            number * self._share(self.listed(step, layer), ranks)
            for step, (number, ranks) in enumerate(zip(forwards, ulysses, strict=True))
            for layer in range(self.num_layers)
        ]
        return math.fsum(shares) / (sum(forwards) * self.num_layers)

    def list_bytes(self, ulysses: int) -> int:
        """Returns the bytes of the block lists, and of their lengths, that a rank holds for one branch of guidance.

        `ulysses` ranks share the heads. In each layer, every block list of a rank takes as much memory as the rank's
        longest one. The result is for the rank and the band with the most bytes.
        """
        bands = self.lengths[self.band(self.dense_steps) :]  # guarded steps make no lists
        return max(self._list_bytes(layers, rank, ulysses) for layers in bands for rank in range(ulysses))

    def _list_bytes(self, layers: Sequence[tuple[int, ...] | None], rank: int, ulysses: int) -> int:
        total = 0
        for heads in filter(None, layers[self.dense_layers :]):
            own = [heads[head] for head in self.assigned(heads, ulysses)[rank] if heads[head]]
            total += len(own) * self.num_blocks * (max(own, default=0) + 1) * _INDEX_BYTES
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "block": BLOCK,
            "blocks": self.num_blocks,
            "listed": self.longest,
            "density": round(self.density, 4),
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "lists_every": self.lists_every,
        }

    def bands_json(self) -> list[dict[str, Any]]:
        """Returns one dict for each band, with these keys:

        * "steps": the first and the last step of the band, counted from 0.
        * "layers": the mean density of each layer.
        * "fp8_heads": the number of heads in float8, added up over all layers.

        The first `dense_layers` layers have the density 1 and no float8 heads. The first `dense_steps` steps are dense
        in all layers, but "layers" does not show this.
        """
        ends = [*self.bands[1:], self.num_steps]
        guarded = range(self.dense_layers)
        return [
            {
                "steps": [start, end - 1],
                "layers": [
                    1.0 if layer in guarded else round(self._share(heads), 4) for layer, heads in enumerate(layers)
                ],
                "fp8_heads": sum(heads.count(0) for heads in layers[self.dense_layers :] if heads),
            }
            for start, end, layers in zip(self.bands, ends, self.lengths, strict=True)
        ]


@lru_cache(maxsize=4096)
def assigned(work: tuple[float, ...], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns which heads each rank of Ulysses gets, as indices of heads; all ranks get equally many heads.

    `work` holds the work of each head. The heads with the most work are assigned first, each to the rank that has the
    least work so far. If the original order of the heads divides the work as evenly, the heads keep this order.
    """
    share = len(work) // ranks
    in_order = tuple(tuple(range(rank * share, (rank + 1) * share)) for rank in range(ranks))
    own: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(work)), key=lambda head: -work[head]):
        least = min((heads for heads in own if len(heads) < share), key=lambda heads: sum(work[h] for h in heads))
        least.append(head)
    balanced = tuple(tuple(sorted(heads)) for heads in own)
    return min(in_order, balanced, key=lambda heads: _most_work(work, heads))


def _most_work(work: Sequence[float], heads_of_ranks: Sequence[Sequence[int]]) -> float:
    """Returns the work of the rank that has the most."""
    return max(sum(work[head] for head in heads) for heads in heads_of_ranks)


def blocks_of(token_grid: tuple[int, int, int], *, has_last: bool) -> tuple[int, int, int]:
    """Returns three numbers of blocks: of the video, of its first latent frame, and of its last latent frame.

    A block counts for a frame if it holds tokens of this frame. If `has_last` is False, the third number is 0.
    """
    _, *frame = token_grid
    of_frame, tokens = math.prod(frame), math.prod(token_grid)
    num_blocks = -(-tokens // BLOCK)
    last_blocks = num_blocks - (tokens - of_frame) // BLOCK if has_last else 0  # its tokens come last in brick order
    return num_blocks, -(-of_frame // BLOCK), last_blocks


def list_length(density: float, token_grid: tuple[int, int, int], *, has_last: bool) -> int:
    """Returns how many key blocks each block list of a head with this density has.

    Even at a low density, a block list has room for the blocks of the first frame and for the queries' own block. If
    `has_last` is True, it also has room for the blocks of the last frame.
    """
    num_blocks, first_blocks, last_blocks = blocks_of(token_grid, has_last=has_last)
    kept = min(first_blocks + last_blocks + 1, num_blocks)
    return max(kept, math.ceil(density * num_blocks - 1e-9))
