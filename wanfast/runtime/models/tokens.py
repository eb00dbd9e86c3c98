"""Defines the two forms of activations: a plain tensor, or 8-bit values with a scale for each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest value of each 8-bit dtype


class QuantizedTokens(NamedTuple):
    """Represents tokens as values * scale; in each token, the largest |value| is the largest number of the dtype."""

    values: Tensor  # [..., L, d], int8 or float8
    scale: Tensor  # [..., L], float32


Tokens = Tensor | QuantizedTokens


def packed(x: Tensor) -> Tensor:
    """Returns a copy with standard strides.

    `contiguous` may return a view with other strides in dims of size 1, and torch.compile then recompiles.
    """
    return x.clone(memory_format=torch.contiguous_format)
