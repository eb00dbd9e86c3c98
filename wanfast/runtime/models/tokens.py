"""Products and exchanges read tokens as they are, or in 8 bits with a scale for each token; both are dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest value of each 8-bit dtype


class QuantizedTokens(NamedTuple):
    """Represents tokens as values * scale; the largest value of each token is the largest of the dtype."""

    values: Tensor  # [..., L, d], int8 or float8
    scale: Tensor  # [..., L], float32


Tokens = Tensor | QuantizedTokens


def packed(x: Tensor) -> Tensor:
    """Returns a copy: `contiguous` may return a view, and strides of size-1 dims make torch.compile recompile."""
    return x.clone(memory_format=torch.contiguous_format)
