"""What products and exchanges read: tokens as they are, or in 8 bits with a scale for each, densely packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest value of each dtype of 8 bits


class QuantizedTokens(NamedTuple):
    """values * scale stands for the tokens; the largest value of each token is that of the dtype."""

    values: Tensor  # [..., L, d], int8 or float8
    scale: Tensor  # [..., L], float32


Tokens = Tensor | QuantizedTokens


def packed(x: Tensor) -> Tensor:
    """A copy: `contiguous` may return a view, whose strides of size-1 dims make torch.compile compile anew."""
    return x.clone(memory_format=torch.contiguous_format)
