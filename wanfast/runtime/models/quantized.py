"""These linear layers hold weights of 8 bits a value, with a float32 scale for each output channel.

There are three ways to compute the product. Weight-only dequantizes the weight first, so it saves only memory. The
other two also quantize the tokens at run time, each token by its own largest value, and multiply in 8 bits. Int8 and
float8 tensor cores do twice the work of bf16's. If a norm or the activation comes before the product, that pass
quantizes (`fused`). The float8 product needs a GPU of capability 8.9 or higher. A CPU multiplies the same 8-bit values
in float32, which differs only in rounding.

Shapes: B batch, L tokens, K in, N out; weight [N, K], scale [N], bias [N].
Sources: LLM.int8() (arXiv 2208.07339) for scales by row and column; FP8 formats (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.models.fused import HAS_KERNELS, linear_gelu, quantize_tokens
from wanfast.runtime.models.tokens import QuantizedTokens, Tokens

if HAS_KERNELS:
    from wanfast.runtime.models import int8_kernel

ProductFn = Callable[[QuantizedTokens, Tensor, Tensor, Tensor], Tensor]  # x, weight, scale, bias -> x W^T + b


class QuantizedLinear(nn.Module):
    """Applies a linear layer by an 8-bit scheme; with `gelu`, the tanh GELU and then another such layer follow it."""

    def __init__(self, scheme: Scheme, dim_in: int, dim_out: int, dtype: torch.dtype, *, gelu: bool = False) -> None:
        super().__init__()
        weight_dtype, self.multiply = PRODUCTS[scheme]
        self.scheme, self.gelu = scheme, gelu
        values = torch.empty(dim_out, dim_in, dtype=weight_dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(dim_out, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim_out, dtype=dtype), requires_grad=False)

    def forward(self, x: Tokens) -> Tokens:
        """Returns the result in the dtype of the bias, or in 8 bits after `gelu` if the scheme quantizes tokens."""
        return self._outputs(x, self.weight, self.scale, self.bias)

    def part(self, x: Tokens, part: int, parts: int) -> Tokens:
        """Returns one of `parts` equal parts of the outputs."""
        return self._outputs(x, *(each.chunk(parts)[part] for each in (self.weight, self.scale, self.bias)))

    def _outputs(self, x: Tokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tokens:
        if self.multiply is None:
            assert isinstance(x, Tensor)
            plain = dequantize(weight, scale).to(bias.dtype)
            return (linear_gelu if self.gelu else F.linear)(x.to(plain.dtype), plain, bias)
        tokens = x if isinstance(x, QuantizedTokens) else quantize_tokens(x, weight.dtype)
        out = self.multiply(tokens, weight, scale, bias)
        return quantize_tokens(out, weight.dtype, gelu=True) if self.gelu else out


def int8_product(x: QuantizedTokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns the product [B, L, N] of int8 values, in the dtype of the bias."""
    if not (HAS_KERNELS and x.values.is_cuda):
        sums = torch._int_mm(x.values.flatten(0, -2), weight.t()).view(*x.values.shape[:-1], -1)
        return _scaled(sums, x, scale, bias)
    out: Tensor = int8_kernel.int8_product(x.values.flatten(0, -2), weight, x.scale.flatten(), scale, bias)
    return out.view(*x.values.shape[:-1], -1)


def fp8_product(x: QuantizedTokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns the product [B, L, N] of float8 e4m3 values, in the dtype of the bias."""
    if not x.values.is_cuda:
        return _scaled(F.linear(x.values.float(), weight.float()), x, scale, bias)
    product: Tensor = torch._scaled_mm(
        x.values.flatten(0, -2), weight.t(), x.scale.view(-1, 1), scale.unsqueeze(0), bias,
        out_dtype=bias.dtype, use_fast_accum=True,
    )  # fmt: skip
    return product.view(*x.values.shape[:-1], -1)


def _scaled(sums: Tensor, x: QuantizedTokens, scale: Tensor, bias: Tensor) -> Tensor:
    return (sums.float() * x.scale.unsqueeze(-1) * scale + bias.float()).to(bias.dtype)


# The weight's dtype, and the product with tokens of that dtype; None dequantizes the weight.
PRODUCTS: dict[Scheme, tuple[torch.dtype, ProductFn | None]] = {
    "int8-weight-only": (torch.int8, None),
    "int8-dynamic": (torch.int8, int8_product),
    "fp8-rowwise": (torch.float8_e4m3fn, fp8_product),
}


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Returns the float32 weight [N, K] that 8-bit values and their scales [N] represent."""
    return values.float() * scale.unsqueeze(1)
