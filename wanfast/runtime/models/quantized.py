"""These linear layers hold 8-bit weights, with a float32 scale for each output channel.

The scheme decides how the product is computed. `int8-weight-only` dequantizes the weight first, so it saves only
memory. `int8-dynamic` and `fp8-rowwise` also quantize the tokens at run time, with a scale for each token, and multiply
8-bit values. Tensor cores multiply 8-bit values twice as fast as bf16. If a norm or GELU precedes the product, the
kernel of the norm or GELU also quantizes its own result (module `fused`). The float8 product needs a GPU of compute
capability 8.9 or higher. A CPU multiplies the float8 values in float32; the result differs from a GPU's result only in
rounding.

Shapes: B batch, L tokens, K in, N out; weight [N, K], scale [N], bias [N].
Sources: LLM.int8() (arXiv 2208.07339) for scales by row and column; FP8 formats (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.models.fused import linear_gelu, quantize_tokens
from wanfast.runtime.models.kernels import HAS_KERNELS
from wanfast.runtime.models.tokens import QuantizedTokens, Tokens, rows_of

if HAS_KERNELS:
    from wanfast.runtime.models import int8_kernel

ProductFn = Callable[[QuantizedTokens, Tensor, Tensor, Tensor], Tensor]  # x, weight, scale, bias -> x W^T + b


class QuantizedLinear(nn.Module):
    """Applies a linear layer with weights of an 8-bit scheme, and then GELU (tanh) if `gelu` is true.

    If `gelu` is true, the next layer must be a QuantizedLinear too, because the result may be quantized.
    """

    def __init__(self, scheme: Scheme, dim_in: int, dim_out: int, dtype: torch.dtype, *, gelu: bool = False) -> None:
        super().__init__()
        weight_dtype, self.multiply = PRODUCTS[scheme]
        self.scheme, self.gelu = scheme, gelu
        values = torch.empty(dim_out, dim_in, dtype=weight_dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(dim_out, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim_out, dtype=dtype), requires_grad=False)

    def forward(self, x: Tokens) -> Tokens:
        """Returns the layer's output, as QuantizedTokens or as a plain tensor.

        The output is QuantizedTokens if two things hold: `gelu` is True, and the scheme also quantizes tokens.
        Otherwise the output is a plain tensor with the dtype of the bias.
        """
        return self._outputs(x, self.weight, self.scale, self.bias)

    def of_shifted(self, x: Tensor, shift: Tensor) -> Tokens:
        """Returns the layer's output for x + `shift`, where `shift` [in] float32 is the same for all tokens.

        Only the bias changes, so this needs no pass over the tokens.
        """
        bias = self.bias + (self.weight.float() * shift).sum(-1) * self.scale
        return self._outputs(x, self.weight, self.scale, bias.to(self.bias.dtype))

    def part(self, x: Tokens, part: int, parts: int) -> Tokens:
        """Returns the output channels of one group, and leaves out all others: [..., out / parts].

        The output channels are divided into `parts` equal groups. `part` is the group's number, counted from 0.
        """
        return self._outputs(x, *(each.chunk(parts)[part] for each in (self.weight, self.scale, self.bias)))

    def chosen(self, x: Tokens, groups: Tensor, parts: int) -> Tokens:
        """Returns the output channels of n groups, and leaves out all others: [..., n * out / parts].

        The output channels are divided into `parts` equal groups, counted from 0. `groups` [n] holds the numbers of the
        groups to return; the result has the order of `groups`.
        """
        return self._outputs(x, *(rows_of(each, groups, parts) for each in (self.weight, self.scale, self.bias)))

    def _outputs(self, x: Tokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tokens:
        if self.multiply is None:
            assert isinstance(x, Tensor)
            plain = dequantize(weight, scale).to(bias.dtype)
            return (linear_gelu if self.gelu else F.linear)(x.to(plain.dtype), plain, bias)
        tokens = x if isinstance(x, QuantizedTokens) else quantize_tokens(x, weight.dtype)
        out = self.multiply(tokens, weight, scale, bias)
        return quantize_tokens(out, weight.dtype, gelu=True) if self.gelu else out


def int8_product(x: QuantizedTokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns (x.values * x.scale) (weight * scale)^T + bias: [B, L, N] in the dtype of `bias`.

    x.values: int8 [B, L, K]; x.scale: [B, L], one scale for each token; weight: int8 [N, K]; scale and bias: [N].
    """
    if not (HAS_KERNELS and x.values.is_cuda):
        sums = torch._int_mm(x.values.flatten(0, -2), weight.t()).view(*x.values.shape[:-1], -1)
        return _scaled(sums, x, scale, bias)
    out: Tensor = int8_kernel.int8_product(x.values.flatten(0, -2), weight, x.scale.flatten(), scale, bias)
    return out.view(*x.values.shape[:-1], -1)


def fp8_product(x: QuantizedTokens, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns (x.values * x.scale) (weight * scale)^T + bias: [B, L, N] in the dtype of `bias`.

    x.values: float8 e4m3 [B, L, K]; x.scale: [B, L], one scale for each token; weight: float8 e4m3 [N, K]; scale and
    bias: [N].
    """
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
