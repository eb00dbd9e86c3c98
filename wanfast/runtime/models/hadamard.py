"""Multiplies each head's channels by a Hadamard matrix.

If a few channels of a head have large values, the matrix spreads these values over all channels of the head.

Shapes: D head dim.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor


def hadamard_rotated(x_D: Tensor) -> Tensor:
    """Returns x [..., D] times the orthonormal Hadamard matrix of size D; D must be a power of two."""
    x, half = x_D, 1
    while half < x_D.shape[-1]:
        a, b = rearrange(x, "... (m two r) -> two ... m r", two=2, r=half)
        x, half = torch.stack((a + b, a - b), dim=-2).flatten(-3), 2 * half
    return x / math.sqrt(x_D.shape[-1])
