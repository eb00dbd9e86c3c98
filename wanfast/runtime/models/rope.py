"""Rotary position embedding over a latent video's three axes.

Each head's D dims are D/2 adjacent pairs, rotated as complex numbers by position * frequency. The pairs are dealt out
to time, height and width (22 + 21 + 21 of 64), each axis with frequencies of its own. Angles are formed in float64 and
kept as float32 cos/sin: equal to float32 rounding where the reference multiplies in complex128, at a fraction of the
traffic. Tables depend on the token grid alone: build once a clip, reuse in every layer and step.

Shapes: B batch, L tokens = T*Y*X, H heads, D head dim.
Source: RoFormer (Su et al. 2021) section 3.4.2; the split and frequencies are Wan's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class RotaryTables(NamedTuple):
    """cos and sin of every token's angles, each [L, 1, D/2] float32 (the 1 broadcasts over heads)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(
    token_grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu", theta: float = 10000.0
) -> RotaryTables:
    """Tables for the tokens of a (T, Y, X) grid, X fastest, positions counted from 0."""
    axis_y = axis_x = 2 * (head_dim // 6)
    axis_dims = (head_dim - axis_y - axis_x, axis_y, axis_x)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in token_grid))  # [L, 3]
    angles = torch.cat(
        [
            torch.outer(position, theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            for position, dim in zip(positions.unbind(1), axis_dims, strict=True)
        ],
        dim=1,
    ).unsqueeze(1)
    return RotaryTables(angles.cos().float().to(device), angles.sin().float().to(device))


def apply_rotary(x_BLHD: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of x [B, L, H, D] float32; same shape and dtype back."""
    even, odd = rearrange(x_BLHD, "... (D two) -> two ... D", two=2)
    cos, sin = tables
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
