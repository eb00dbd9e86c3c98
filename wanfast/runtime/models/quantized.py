"""Linear layers whose weights are 8 bits a value, with a float32 scale for each output channel.

Three ways to make the product. Weight-only undoes the quantization first and so saves memory alone. The other two also
quantize the tokens as they come, each token by its own largest value, and multiply in 8 bits: int8 and float8 tensor
cores do twice the work of bf16's. A CPU has no float8 product: there it is that of the same 8-bit values in float32,
which differs in rounding alone; GPUs need capability 8.9.

Shapes: L tokens (any leading dimensions), K in, N out; weight [N, K], scale [N], bias [N].
Sources: LLM.int8() (arXiv 2208.07339) for scales by row and column; FP8 formats (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanfast.runtime.models.fused import linear_gelu

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TINIEST = 1e-12  # a token of zeros has a scale too

ProductFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, weight, scale, bias -> x W^T + b


class QuantizedLinear(nn.Module):
    """A linear layer with 8-bit weights, and the tanh GELU after it if `gelu`. Its input decides the output's dtype."""

    def __init__(self, product: str, dim_in: int, dim_out: int, dtype: torch.dtype, *, gelu: bool = False) -> None:
        super().__init__()
        self.product, self.gelu = product, gelu
        values = torch.empty(dim_out, dim_in, dtype=PRODUCTS[product][0])
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(dim_out, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim_out, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        _, multiply = PRODUCTS[self.product]
        x = x.to(self.bias.dtype)
        if self.gelu and self.product == "int8-weight-only":
            return linear_gelu(x, _dequantized(self.weight, self.scale, x.dtype), self.bias)
        out = multiply(x, self.weight, self.scale, self.bias)
        return F.gelu(out, approximate="tanh") if self.gelu else out


def int8_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, _dequantized(weight, scale, x.dtype), bias)


def int8_dynamic(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    tokens, token_scale = quantize_rows(x.flatten(0, -2), torch.int8)
    product = torch._int_mm(tokens, weight.t()) if _has_int_mm(x) else tokens.float() @ weight.float().t()
    return _scaled(product, token_scale, scale, bias, x)


def fp8_rowwise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    tokens, token_scale = quantize_rows(x.flatten(0, -2), torch.float8_e4m3fn)
    if not x.is_cuda:
        return _scaled(tokens.float() @ weight.float().t(), token_scale, scale, bias, x)
    product: Tensor = torch._scaled_mm(
        tokens, weight.t(), token_scale.unsqueeze(1), scale.unsqueeze(0), bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return product.view(*x.shape[:-1], -1)


# The weight's dtype, and how it is multiplied.
PRODUCTS: dict[str, tuple[torch.dtype, ProductFn]] = {
    "int8-weight-only": (torch.int8, int8_weight_only),
    "int8-dynamic": (torch.int8, int8_dynamic),
    "fp8-rowwise": (torch.float8_e4m3fn, fp8_rowwise),
}


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [L, K] of `dtype`, scale [L] float32) with values * scale near x: the largest of a row is exact."""
    wide, largest = x.float(), _LARGEST[dtype]
    scale = wide.abs().amax(-1).clamp_min(_TINIEST) / largest
    values = wide / scale.unsqueeze(-1)
    return (values.round() if dtype == torch.int8 else values).clamp(-largest, largest).to(dtype), scale


def _scaled(product: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """What a product of 8-bit values stands for, in the dtype and the leading dimensions of x."""
    out = product.float() * token_scale.unsqueeze(1) * scale + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.float() * scale.unsqueeze(1)).to(dtype)


def _has_int_mm(x: Tensor) -> bool:
    """CUDA's wants more than 16 rows; a few tokens are not worth it."""
    return not x.is_cuda or x.flatten(0, -2).shape[0] > 16
