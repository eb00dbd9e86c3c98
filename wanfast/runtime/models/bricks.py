"""This module orders a video's tokens in bricks, so that neighbours in time and space become neighbours in memory.

In raster order, 128 tokens in a row are a strip of one frame. In brick order, they are 2 x 8 x 8 tokens, which attend
to much the same tokens. Sparse attention chooses such blocks as a whole. The order is an exact permutation, so that
dense attention gives the same result in both orders, except for the rounding of sums.
The first latent frame holds the given image and forms bricks of its own: 21 frames are 1 + 10 x 2. A brick of fewer
frames is wider instead. Bricks at the end of an axis are smaller if the grid is no multiple of the brick. The path
through the bricks turns around at each edge, because consecutive bricks shall touch also where a block spans two.

Shapes: L tokens = T*Y*X of the token grid (T frames, Y rows, X columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """Permutes tokens, and restores their raster order; without tensors, both functions return the tokens unchanged."""

    order: Tensor | None = None  # [L]: the raster index of the token at each place
    inverse: Tensor | None = None  # [L]: the place of each token of the raster

    def permute(self, x: Tensor, dim: int) -> Tensor:
        """Returns the tokens in this order; in x they lie along `dim`, in raster order."""
        return x if self.order is None else x.index_select(dim, self.order)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        """Returns the tokens in raster order; in x they lie along `dim`, in this order."""
        return x if self.inverse is None else x.index_select(dim, self.inverse)


RASTER = TokenOrder()


def brick_order(
    token_grid: tuple[int, int, int], brick: tuple[int, int, int], device: torch.device | str = "cpu"
) -> TokenOrder:
    """Returns the order of the tokens of a (T, Y, X) grid in bricks of (frames, rows, columns)."""
    num_frames, num_rows, num_columns = token_grid
    frames, rows, columns = brick
    t, y, x = torch.cartesian_prod(*map(torch.arange, token_grid)).unbind(1)
    layer = (t + frames - 1) // frames  # 0 for the first frame alone
    frames_of_layer = torch.where(layer == 0, 1, (num_frames - 1 - (layer - 1) * frames).clamp(max=frames))
    column = x // (columns * frames // frames_of_layer)
    num_brick_rows = -(-num_rows // rows)
    row = layer * num_brick_rows + _turned(y // rows, layer, num_brick_rows)
    brick_number = row * 2 * num_columns + _turned(column, row, num_columns)
    order = brick_number.argsort(stable=True).to(device)  # inside a brick, tokens keep their raster order
    return TokenOrder(order, order.argsort())


def _turned(index: Tensor, line: Tensor, count: int) -> Tensor:
    """Returns numbers that rise with `index` on even lines, and fall on odd lines; `count` exceeds every index."""
    return torch.where(line % 2 == 0, index, count - 1 - index)
