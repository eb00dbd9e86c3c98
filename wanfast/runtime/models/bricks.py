"""This module orders a video's tokens in bricks, so that neighbours in time and space become neighbours in memory.

In raster order, 128 successive tokens are a strip of one frame. In brick order, they are a box of 2 x 8 x 8 tokens. The
tokens of such a box need almost the same keys. So sparse attention can choose or drop all tokens of a box together.
Dense attention gives the same result in both orders, except for the rounding of sums.

The first latent frame holds the given image, and forms bricks of its own. For example, 21 frames form one layer of
bricks with 1 frame, and ten layers of bricks with 2 frames. If a last image is given, the last latent frame forms
bricks of its own too. Bricks with 1 frame have twice as many columns as bricks with 2 frames. If the grid is not a
multiple of the brick, the bricks at the end of an axis are smaller.
Sparse attention divides the ordered tokens into blocks of 128 tokens. A block may lie in two successive bricks. Its
tokens are still neighbours, because successive bricks always touch: the order of the bricks turns round at each edge of
the grid.

Shapes: L tokens = T*Y*X of the token grid (T frames, Y rows, X columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """Permutes tokens into an order, and restores their raster order.

    If `order` and `inverse` are None, the order is the raster order, and the tokens are returned unchanged.
    """

    order: Tensor | None = None  # [L]: the raster index of the token at each place
    inverse: Tensor | None = None  # [L]: the place of each token of the raster

    def permute(self, x: Tensor, dim: int) -> Tensor:
        """Takes x in raster order, and returns x in the order of this object; the tokens lie along `dim`."""
        return x if self.order is None else x.index_select(dim, self.order)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        """Takes x in the order of this object, and returns x in raster order; the tokens lie along `dim`."""
        return x if self.inverse is None else x.index_select(dim, self.inverse)


RASTER = TokenOrder()


def brick_order(
    token_grid: tuple[int, int, int],
    brick: tuple[int, int, int],
    device: torch.device | str = "cpu",
    *,
    has_last: bool = False,
) -> TokenOrder:
    """Returns the order that groups the tokens of a (T, Y, X) grid into bricks of (frames, rows, columns).

    The first latent frame holds a given image and has its own bricks. If `has_last` is true, the last latent frame
    holds a given image too, and also has its own bricks.
    """
    num_frames, num_rows, num_columns = token_grid
    frames, rows, columns = brick
    t, y, x = torch.cartesian_prod(*map(torch.arange, token_grid)).unbind(1)
    num_inner = num_frames - has_last  # these have a last layer of fewer frames, if they do not fill it
    last_layer = 1 + (num_inner + frames - 2) // frames
    layer = torch.where(t < num_inner, (t + frames - 1) // frames, last_layer)  # 0 for the first frame alone
    is_alone = (layer == 0) | (layer == last_layer)
    frames_of_layer = torch.where(is_alone, 1, (num_inner - 1 - (layer - 1) * frames).clamp(max=frames))
    column = x // (columns * frames // frames_of_layer)
    num_brick_rows = -(-num_rows // rows)
    row = layer * num_brick_rows + _turned(y // rows, layer, num_brick_rows)
    brick_number = row * 2 * num_columns + _turned(column, row, num_columns)
    order = brick_number.argsort(stable=True).to(device)  # inside a brick, tokens keep their raster order
    return TokenOrder(order, order.argsort())


def _turned(index: Tensor, row: Tensor, count: int) -> Tensor:
    """Returns numbers that rise with `index` in even rows, and fall in odd rows; `count` exceeds every index."""
    return torch.where(row % 2 == 0, index, count - 1 - index)
