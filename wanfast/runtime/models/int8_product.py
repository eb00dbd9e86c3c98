"""The product of int8 tokens and int8 weights, scaled as it leaves the registers."""

from __future__ import annotations

import torch
from torch import Tensor

from wanfast.runtime.models.tokens import QuantizedTokens


def int8_product(x: QuantizedTokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """[B, L, N] in the dtype of the bias, from int8 values [B, L, K]."""
    product = torch._int_mm(x.values.flatten(0, -2), weight.t()).view(*x.values.shape[:-1], -1)
    out = product.float() * x.scale.unsqueeze(-1) * scale + bias.float()
    return out.to(bias.dtype)
