"""Each function here fuses the elementwise steps and norms that lie between matrix products and attention.

Each function has a formula in plain PyTorch and a Triton kernel in `fused_kernels`. The kernel runs for inference on a
GPU; the formula runs in all other cases. Both compute in float32, whatever the dtypes of the inputs and outputs. The
kernel reads and writes each value once, because these steps are memory-bound. `linear_gelu` has a cuBLAS kernel instead
of a Triton kernel.

`quantize_tokens` and `add_layer_norm` can return 8-bit values, for a matrix product that multiplies such values. Each
token gets a scale of its own.

Shapes: B batch, L tokens, d model dim, H heads, D head dim. Weights, biases and gates are [d] or [B, 1, d], float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.hadamard import hadamard_rotated
from wanfast.runtime.models.kernels import HAS_KERNELS
from wanfast.runtime.models.operators import opaque
from wanfast.runtime.models.rope import RotaryTables, apply_rotary
from wanfast.runtime.models.tokens import FP8, LARGEST, QuantizedTokens, Tokens

# Most bytes belong to the residual stream: [L, d] in float32, 1.5 GB at 75,600 tokens. Inductor's code for the formulas
# computes the residual stream again for each consumer, and reads each RoPE pair twice.
if HAS_KERNELS:
    from wanfast.runtime.models import fused_kernels

_TINIEST = 1e-12  # so that a token of zeros has a scale


def add_layer_norm(
    x_BLd: Tensor, y_BLd: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tokens]:
    """Returns (s, layer norm of s), where s = x + gate * y is the residual stream and y a sublayer's output.

    s is float32. The layer norm, (s - mean) / std * weight + bias over d, is rounded to `dtype`, or quantized if
    `dtype` has 8 bits. A gate of None means 1.
    """
    if _by_kernel(x_BLd):
        x, out, scale = fused_kernels.add_layer_norm(x_BLd, y_BLd, gate, weight, bias, eps, dtype)
        return x, QuantizedTokens(out, scale) if dtype in LARGEST else out
    x = x_BLd + (y_BLd if gate is None else gate * y_BLd)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias
    return x, quantize_tokens(normed, dtype) if dtype in LARGEST else normed.to(dtype)


def quantize_tokens(x_BLd: Tensor, dtype: torch.dtype, *, gelu: bool = False) -> QuantizedTokens:
    """Quantizes x, or gelu(x) if `gelu` is true, to the 8-bit `dtype`.

    GELU is computed in its tanh approximation. Each token is divided by its own scale: the token's largest |value|,
    divided by the largest number of `dtype`.
    """
    if _by_kernel(x_BLd):
        return QuantizedTokens(*fused_kernels.quantize_tokens(x_BLd, dtype, gelu))
    x = x_BLd.float()
    x = F.gelu(x, approximate="tanh") if gelu else x
    scale = x.abs().amax(-1).clamp_min(_TINIEST) / LARGEST[dtype]
    values = x / scale.unsqueeze(-1)
    values = (values.round() if dtype == torch.int8 else values).clamp(-LARGEST[dtype], LARGEST[dtype])
    return QuantizedTokens(values.to(dtype), scale)


def rms_norm_heads(
    x_BLd: Tensor,
    weight: Tensor,
    eps: float,
    num_heads: int,
    rope: RotaryTables | None = None,
    *,
    parts: int = 1,
    by_kernel: bool = True,
) -> Tensor:
    """Returns x / rms(x) * weight, rotated if `rope` is given; the heads are divided into `parts` equal groups.

    The root mean square is over all heads together. The result [parts, B, L, H / parts, D] is contiguous and has the
    dtype of x. If `by_kernel` is False, the Triton kernel is never used, so that it need not be compiled.
    """
    if by_kernel and _by_kernel(x_BLd):
        cos, sin = rope or (None, None)
        out = fused_kernels.rms_norm_rotate(x_BLd, weight, eps, cos, sin, parts)
        return rearrange(out, "P B L (h D) -> P B L h D", h=num_heads // parts)
    normed = rearrange(F.rms_norm(x_BLd.float(), weight.shape, weight, eps), "B L (H D) -> B L H D", H=num_heads)
    out = (apply_rotary(normed, rope) if rope else normed).to(x_BLd.dtype)
    return rearrange(out, "B L (P h) D -> P B L h D", P=parts).contiguous()


def heads_to_fp8(
    x_BLd: Tensor,
    scale_H: Tensor,
    centre_HD: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    rope: RotaryTables | None = None,
    hadamard: bool = False,
    parts: int = 1,
) -> Tensor:
    """Returns each head of x, divided by the head's scale, in float8 (e4m3): [parts, B, L, H / parts, D].

    The heads are divided into `parts` equal groups. Each of four arguments adds a step before the division, in this
    order:
    * `norm` (weight, epsilon): RMS norm over all heads together;
    * `rope`: rotation by these tables;
    * `centre_HD`: subtraction of this tensor;
    * `hadamard`: multiplication by a Hadamard matrix.
    """
    if _by_kernel(x_BLd):
        weight, eps = norm or (None, 0.0)
        cos, sin = rope or (None, None)
        out = fused_kernels.heads_to_fp8(x_BLd, scale_H, centre_HD, weight, eps, cos, sin, hadamard, parts)
        return rearrange(out, "P B L (h D) -> P B L h D", h=len(scale_H) // parts)
    x = x_BLd.float()
    x = x if norm is None else F.rms_norm(x, norm[0].shape, *norm)
    x = rearrange(x, "B L (H D) -> B L H D", H=len(scale_H))
    x = apply_rotary(x, rope) if rope else x
    x = x if centre_HD is None else x - centre_HD
    x = (hadamard_rotated(x) if hadamard else x) / scale_H[:, None]
    rounded = x.clamp(-LARGEST[FP8], LARGEST[FP8]).to(FP8)
    return rearrange(rounded, "B L (P h) D -> P B L h D", P=parts).contiguous()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns gelu(x W^T + b) [..., out], with GELU in its tanh approximation; x has the dtype of the weight.

    For inference on a GPU, one cuBLAS kernel computes the product and the GELU.
    """
    if x.is_cuda and not torch.is_grad_enabled():
        return _linear_gelu(x, weight, bias)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# Opaque to the compiler, which would split it into a product and a pass over [L, ffn_dim] for the activation.
@opaque("wanfast::linear_gelu", shape=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])))
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)  # cuBLAS's epilogue: tanh on GPUs
    return out.view(*x.shape[:-1], -1)


def make_operators() -> None:
    """Registers the Triton kernels as operators of torch, so that torch.compile can trace calls of the kernels."""
    if HAS_KERNELS:
        fused_kernels.make_operators()


def _by_kernel(x_BLd: Tensor) -> bool:
    """Returns whether the kernels can run: they give no gradients, and take one row of modulation for all tokens."""
    return HAS_KERNELS and x_BLd.is_cuda and x_BLd.shape[0] == 1 and not torch.is_grad_enabled()
