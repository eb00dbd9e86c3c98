"""The Triton kernels behind `fused`: a program takes a whole row of d values into registers, so each is read once.

At d = 5120 a row is padded to 8192 lanes, of which those beyond d read and write nothing. The kernels wait for memory:
2.7 of an H100's 3.35 TB/s (LOG.md). Each is a Triton operator of torch, so that a compiled block stays one graph and
the kernels lie in the same caches as Inductor's own.

Shapes: B batch, of one, L tokens, d model dim, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_NUM_WARPS = 8


@triton_op("wanfast::layer_norm", mutates_args={})
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    d = x.shape[-1]
    _check_rows(x, weight, bias)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    wrap_triton(_layer_norm)[(x.numel() // d,)](
        x, weight, bias, out, eps, d=d, BLOCK=triton.next_power_of_2(d), num_warps=_NUM_WARPS
    )
    return out


@triton_op("wanfast::add_layer_norm", mutates_args={})
def add_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    _check_rows(x, y, weight, bias)
    total, out = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    wrap_triton(_add_layer_norm)[(x.numel() // d,)](
        x,
        y,
        weight if gate is None else gate,
        weight,
        bias,
        total,
        out,
        eps,
        d=d,
        GATED=gate is not None,
        BLOCK=triton.next_power_of_2(d),
        num_warps=_NUM_WARPS,
    )
    return total, out


@triton_op("wanfast::rms_norm_rotate", mutates_args={})
def rms_norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x may be a part of wider rows; cos and sin are [L, 1, D/2], or neither is given."""
    d = x.shape[-1]
    assert x.stride(-1) == 1, "the values of a row lie side by side"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wrap_triton(_rms_norm_rotate)[(x.numel() // d,)](
        x,
        x.stride(-2),
        weight,
        weight if cos is None else cos,
        weight if sin is None else sin,
        out,
        eps,
        d=d,
        PAIRS_A_HEAD=d // 2 if cos is None else cos.shape[-1],
        ROTATED=cos is not None,
        BLOCK=triton.next_power_of_2(d),
        num_warps=_NUM_WARPS,
    )
    return out


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), f"rows lie one after the other, not {tensor.stride()}"


@triton.jit
def _layer_norm(x_ptr, weight_ptr, bias_ptr, out_ptr, eps, d: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + lanes, lanes < d, 0.0)
    _store_normed(x, weight_ptr, bias_ptr, out_ptr + start, eps, d, BLOCK)


@triton.jit
def _add_layer_norm(
    x_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, eps,
    d: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * d
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    y = tl.load(y_ptr + start + lanes, mask, 0.0).to(tl.float32)
    if GATED:
        y *= tl.load(gate_ptr + lanes, mask, 0.0)
    x = tl.load(x_ptr + start + lanes, mask, 0.0) + y
    tl.store(total_ptr + start + lanes, x, mask)
    _store_normed(x, weight_ptr, bias_ptr, out_ptr + start, eps, d, BLOCK)


@triton.jit
def _store_normed(x, weight_ptr, bias_ptr, out_ptr, eps, d: tl.constexpr, BLOCK: tl.constexpr):
    """Two passes over registers, as variances of values far from zero want it."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    centred = tl.where(mask, x - tl.sum(x, 0) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / d + eps)
    out = normed * tl.load(weight_ptr + lanes, mask, 0.0) + tl.load(bias_ptr + lanes, mask, 0.0)
    tl.store(out_ptr + lanes, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _rms_norm_rotate(
    x_ptr, stride, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps,
    d: tl.constexpr, PAIRS_A_HEAD: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    x = tl.load(x_ptr + row * stride + lanes, mask, 0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / d + eps)
    x *= tl.load(weight_ptr + lanes, mask, 0.0)
    if ROTATED:
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        pairs = row * PAIRS_A_HEAD + tl.arange(0, BLOCK // 2) % PAIRS_A_HEAD
        cos, sin = tl.load(cos_ptr + pairs), tl.load(sin_ptr + pairs)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    tl.store(out_ptr + row * d + lanes, x.to(out_ptr.dtype.element_ty), mask)
