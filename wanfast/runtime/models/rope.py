"""Rotary position embedding rotates queries and keys by their position on a latent video's three axes.

Each head's D dims are D/2 adjacent pairs. A pair is rotated as a complex number by the angle position * frequency.
Of 64 pairs, 22 rotate by time, 21 by height and 21 by width; each axis has its own frequencies. Angles are computed in
float64 for each position of an axis, and their cosines and sines are stored in float32. The reference multiplies in
complex128; the results are equal to within float32 rounding, and float32 moves fewer bytes. The tables depend only on
the token grid: build them once for a video, and reuse them in every block and step.

Shapes: B batch, L tokens = T*Y*X, H heads, D head dim.
Source: RoFormer (Su et al. 2021) section 3.4.2; the split and frequencies are Wan's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class RotaryTables(NamedTuple):
    """Holds cos and sin of every token's angles, each [L, 1, D/2] float32 (the 1 broadcasts over heads)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(
    token_grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu", theta: float = 10000.0
) -> RotaryTables:
    """Returns the tables for the tokens of a (T, Y, X) grid; X varies fastest, and positions start at 0."""
    axis_y = axis_x = 2 * (head_dim // 6)
    axis_dims = (head_dim - axis_y - axis_x, axis_y, axis_x)
    axes = []
    for axis, (n, dim) in enumerate(zip(token_grid, axis_dims, strict=True)):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(n, dtype=torch.float64), frequencies)
        axes.append(angles.view(*(n if other == axis else 1 for other in range(3)), dim // 2))

    def table(function: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [function(angles).float().to(device).expand(*token_grid, -1) for angles in axes]
        return torch.cat(parts, dim=-1).flatten(0, 2).unsqueeze(1)

    return RotaryTables(table(torch.cos), table(torch.sin))


def apply_rotary(x_BLHD: Tensor, tables: RotaryTables) -> Tensor:
    """Returns x [B, L, H, D] float32 with its pairs (2j, 2j+1) along D rotated; shape and dtype stay the same."""
    even, odd = rearrange(x_BLHD, "... (D two) -> two ... D", two=2)
    cos, sin = tables
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
