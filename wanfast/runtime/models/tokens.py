"""Defines the two forms of activations: a plain tensor, or 8-bit values with a scale for each token.

`packed` copies a tensor, and `rows_of` copies some rows of a tensor. The values of a copy are adjacent in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}  # the largest value of each 8-bit dtype


class QuantizedTokens(NamedTuple):
    """Represents tokens as 8-bit values times a scale; each token has its own scale.

    The scale is the token's largest |value|, divided by the largest number of the 8-bit dtype.
    """

    values: Tensor  # [..., L, d], int8 or float8
    scale: Tensor  # [..., L], float32


Tokens = Tensor | QuantizedTokens


def packed(x: Tensor) -> Tensor:
    """Returns a copy of x with standard strides.

    `x.contiguous()` may return x itself, with other strides in dims of size 1. Then torch.compile would recompile.
    """
    return x.clone(memory_format=torch.contiguous_format)


def rows_of(x: Tensor, groups: Tensor, parts: int) -> Tensor:
    """Divides the rows of x into `parts` equal groups, and returns a copy of the rows of some groups.

    `groups`: the numbers of the wanted groups, counted from 0. The result has the rows in the order of `groups`.
    """
    values = x.view(torch.uint8) if x.dtype in LARGEST else x  # torch does not index float8 everywhere
    return values.view(parts, -1, *x.shape[1:])[groups].flatten(0, 1).view(x.dtype)
