"""This module counts the blocks that sparse attention computes, and the bytes of its lists of blocks.

The tokens of a video are sorted into bricks (small boxes of the token grid). Each 128 successive tokens form a block. A
block of queries attends to the key blocks of its list. The lists of all heads have the same length, so that each head
and each rank has the same work.
This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanfast.runtime.errors import ConfigError

BRICK = (2, 8, 8)  # frames, rows and columns of tokens
BLOCK = math.prod(BRICK)
_INDEX_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Says which calls of self-attention are sparse in one video, and how many blocks these calls compute."""

    num_blocks: int
    first_blocks: int  # the blocks that hold tokens of the given image's frame
    listed: int  # key blocks in each list
    num_layers: int
    dense_steps: int  # the first steps use dense attention
    dense_layers: int  # and so do the first layers of every step
    lists_every: int  # steps after which lists are made again

    @classmethod
    def of(
        cls,
        token_grid: tuple[int, int, int],
        *,
        density: float,
        num_steps: int,
        dense_share: float,
        num_layers: int,
        dense_layers: int,
        lists_every: int,
    ) -> Sparsity:
        """Returns the sparsity for a (T, Y, X) grid of tokens. Raises ConfigError if no call would be sparse.

        A list holds at least the blocks of the first frame and the block of the queries themselves.
        """
        dense_steps = math.ceil(dense_share * num_steps - 1e-9)
        if dense_steps >= num_steps:
            raise ConfigError(
                f"--dense-share {dense_share:g}: all {num_steps} steps would use dense attention: use a smaller share"
            )
        if dense_layers >= num_layers:
            raise ConfigError(
                f"--dense-layers {dense_layers}: all {num_layers} layers would use dense attention: use fewer"
            )
        num_frames, *frame = token_grid
        num_blocks = -(-num_frames * math.prod(frame) // BLOCK)
        first_blocks = -(-math.prod(frame) // BLOCK)
        kept = min(first_blocks + 1, num_blocks)
        return cls(
            num_blocks=num_blocks,
            first_blocks=first_blocks,
            listed=max(kept, math.ceil(density * num_blocks - 1e-9)),
            num_layers=num_layers,
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            lists_every=lists_every,
        )

    @property
    def density(self) -> float:
        """Returns the share of blocks that a sparse call computes, including the blocks that are in every list."""
        return self.listed / self.num_blocks

    def is_dense(self, step: int, layer: int) -> bool:
        """Returns whether a step and layer, both counted from 0, use dense attention."""
        return step < self.dense_steps or layer < self.dense_layers

    def mean_density(self, forwards: Sequence[int]) -> float:
        """Returns the mean density of all calls of a video; a dense call has the density 1.

        `forwards` holds, for each step, the number of forwards that are not skipped.
        """
        dense_layers = [
            self.num_layers if step < self.dense_steps else self.dense_layers for step in range(len(forwards))
        ]
        dense = sum(number * layers for number, layers in zip(forwards, dense_layers, strict=True))
        share = dense / (sum(forwards) * self.num_layers)
        return share + (1 - share) * self.density

    def list_bytes(self, num_heads: int) -> int:
        """Returns the bytes of all lists of one branch of guidance, including the lists' lengths.

        `num_heads` is the number of attention heads of a layer.
        """
        lists = (self.num_layers - self.dense_layers) * num_heads * self.num_blocks
        return lists * (self.listed + 1) * _INDEX_BYTES

    def to_json(self) -> dict[str, Any]:
        return {
            "block": BLOCK,
            "blocks": self.num_blocks,
            "listed": self.listed,
            "density": round(self.density, 4),
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "lists_every": self.lists_every,
        }
