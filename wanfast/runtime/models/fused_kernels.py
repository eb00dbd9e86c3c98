"""These Triton kernels implement the functions of `fused`: each program instance loads one row of d values, only once.

At d = 5120 a row is padded to 8192 lanes; the lanes beyond d read and write nothing. The kernels are memory-bound: they
reach 2.7 of an H100's 3.35 TB/s (LOG.md). For compiled blocks, `make_operators` registers each kernel as an operator of
torch. So a block stays one graph, and Inductor's caches also hold these kernels. Float arguments are constexpr.
Otherwise Inductor would pass them as float64, and the kernels would compute in float64.

Shapes: B batch (1), L tokens, d model dim, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanfast.runtime.models.tokens import LARGEST

_ROWS, _TILE, _GROUP, _WARPS = 24, 2, 8, 4  # of a program of `heads_to_fp8`
wrap_triton: Callable[[Any], Any] = lambda kernel: kernel  # noqa: E731 - torch's own after `make_operators`


def make_operators() -> None:
    """Registers the functions of this module as operators for torch.compile. This function imports the compiler."""
    global wrap_triton
    if wrap_triton is not torch.library.wrap_triton:
        wrap_triton = torch.library.wrap_triton
        for function in (add_layer_norm, quantize_tokens, rms_norm_rotate, heads_to_fp8):
            name = function.__name__
            globals()[name] = torch.library.triton_op(f"wanfast::{name}", function, mutates_args={})


def add_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (s, the layer norm of s, scales), where s = x + gate * y; x, y, s and the layer norm are [B, L, d].

    A gate of None means 1. The layer norm is taken over d, multiplied by `weight`, and increased by `bias`. Its dtype
    is `dtype`. If `dtype` has 8 bits, the layer norm is quantized, and `scales` is [B, L]: one scale for each token.
    Otherwise `scales` is an empty tensor.
    """
    _check_rows(x, y, weight, bias)
    total, (out, scale) = torch.empty_like(x), _output(x, dtype)
    factor = weight if gate is None else gate
    wrap_triton(_add_layer_norm)[_grid(x)](
        x, y, factor, weight, bias, total, out, scale, eps=eps, GATED=gate is not None, **_launch(x, dtype)
    )
    return total, out, scale


def quantize_tokens(x: Tensor, dtype: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    """Quantizes x, or gelu(x) if `gelu` is true.

    Returns (values [B, L, d] in the 8-bit `dtype`, float32 scales [B, L]).
    """
    _check_rows(x)
    out, scale = _output(x, dtype)
    wrap_triton(_quantize_tokens)[_grid(x)](x, out, scale, GELU=gelu, **_launch(x, dtype))
    return out, scale


def _grid(x: Tensor) -> tuple[int]:
    return (x.numel() // x.shape[-1],)


def _output(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = x.shape[:-1] if dtype in LARGEST else (0,)
    return torch.empty_like(x, dtype=dtype), torch.empty(scales, dtype=torch.float32, device=x.device)


def _launch(x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    d = x.shape[-1]
    return {"d": d, "LARGEST": LARGEST.get(dtype, 0.0), "BLOCK": triton.next_power_of_2(d), "num_warps": 4}


def rms_norm_rotate(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, parts: int
) -> Tensor:
    """Returns x / rms(x) * weight for x [B, L, d]; each head is rotated if cos and sin are given.

    The mean square is over all d values of a token. The result is [parts, B, L, d / parts]: the heads are split into
    `parts` equal groups. x may be a column slice of a larger tensor. cos and sin are [L, 1, D/2].
    """
    d = x.shape[-1]
    assert x.stride(-1) == 1, "the values of a row must be adjacent"
    out = torch.empty((parts, *x.shape[:-1], d // parts), dtype=x.dtype, device=x.device)
    wrap_triton(_rms_norm_rotate)[_grid(x)](
        x,
        x.stride(-2),
        weight,
        weight if cos is None else cos,
        weight if sin is None else sin,
        out,
        eps=eps,
        d=d,
        PAIRS_A_HEAD=d // 2 if cos is None else cos.shape[-1],
        ROTATED=cos is not None,
        PARTS=parts,
        BLOCK=triton.next_power_of_2(d),
        num_warps=8,
    )
    return out


def heads_to_fp8(
    x: Tensor,
    scale: Tensor,
    centre: Tensor | None,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    hadamard: bool,
    parts: int,
) -> Tensor:
    """Divides each head of x [B, L, d] by the head's `scale`, and returns the result in float8 e4m3.

    The result is [parts, B, L, d / parts]: the heads are split into `parts` equal groups. `scale` is [H].
    Before the division, up to four steps run in this order: x / rms(x) * weight, rotation by cos and sin, x - centre,
    and the Hadamard matrix. A step is left out if its argument is None or False. `centre` is [H, D]. x may be a column
    slice of a larger tensor.
    """
    d, heads = x.shape[-1], scale.numel()
    assert x.stride(-1) == 1, "the values of a row must be adjacent"
    out = torch.empty((parts, *x.shape[:-1], d // parts), dtype=torch.float8_e4m3fn, device=x.device)
    rows, D = x.numel() // d, d // heads
    wrap_triton(_heads_to_fp8)[(triton.cdiv(rows, _ROWS),)](
        x,
        x.stride(-2),
        scale.contiguous(),
        scale if centre is None else centre.contiguous(),
        scale if weight is None else weight,
        scale if cos is None else cos,
        scale if sin is None else sin,
        out,
        rows,
        eps=eps,
        HEADS=heads,
        D=D,
        NORMED=weight is not None,
        ROTATED=cos is not None,
        CENTRED=centre is not None,
        HADAMARD=hadamard,
        PARTS=parts,
        ROWS=_ROWS,
        TILE=_TILE,
        GROUP=_GROUP,
        BLOCK=triton.next_power_of_2(D),
        num_warps=_WARPS,
        num_stages=1,
    )
    return out


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), f"rows must be contiguous, not of strides {tensor.stride()}"


@triton.jit
def _add_layer_norm(
    x_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, scale_ptr,
    eps: tl.constexpr, d: tl.constexpr, GATED: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    y = tl.load(y_ptr + row * d + lanes, mask, 0.0).to(tl.float32)
    if GATED:
        y *= tl.load(gate_ptr + lanes, mask, 0.0)
    x = tl.load(x_ptr + row * d + lanes, mask, 0.0) + y
    tl.store(total_ptr + row * d + lanes, x, mask)
    _store(_normed(x, weight_ptr, bias_ptr, eps, d, BLOCK), row, out_ptr, scale_ptr, d, LARGEST, BLOCK)


@triton.jit
def _quantize_tokens(
    x_ptr, out_ptr, scale_ptr, d: tl.constexpr, GELU: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * d + lanes, lanes < d, 0.0).to(tl.float32)
    if GELU:  # the tanh formula; 1 + tanh(y) is 2 sigmoid(2 y)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    _store(x, row, out_ptr, scale_ptr, d, LARGEST, BLOCK)


@triton.jit
def _normed(x, weight_ptr, bias_ptr, eps: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the norm in two passes over registers, so that variances of values far from zero are accurate."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    centred = tl.where(mask, x - tl.sum(x, 0) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / d + eps)
    return normed * tl.load(weight_ptr + lanes, mask, 0.0) + tl.load(bias_ptr + lanes, mask, 0.0)


@triton.jit
def _store(x, row, out_ptr, scale_ptr, d: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a row in the dtype of `out_ptr`; LARGEST is the largest value of an 8-bit dtype, or 0 for other dtypes."""
    lanes = tl.arange(0, BLOCK)
    if LARGEST > 0:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # of |x|; as integers they have the order of |x|, NaN last
        scale = tl.max(bits, 0).to(tl.float32, bitcast=True)  # a maximum of floats would lose NaN
        scale = tl.maximum(scale, 1e-12, tl.PropagateNan.ALL) / LARGEST
        tl.store(scale_ptr + row, scale)
        x *= 1 / scale
        if out_ptr.dtype.element_ty == tl.int8:  # a cast to int8 truncates
            x = tl.where(x < 0, x - 0.5, x + 0.5)
    tl.store(out_ptr + row * d + lanes, x.to(out_ptr.dtype.element_ty), lanes < d)


@triton.jit
def _rms_norm_rotate(
    x_ptr, stride, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    eps: tl.constexpr, d: tl.constexpr, PAIRS_A_HEAD: tl.constexpr, ROTATED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride + lanes, lanes < d, 0.0).to(tl.float32)
    x = _rms_normed(x, weight_ptr, eps, d, BLOCK)
    if ROTATED:
        x = _rotated(x, cos_ptr, sin_ptr, PAIRS_A_HEAD, BLOCK)
    _store_heads(x, out_ptr, d, PARTS, BLOCK)


@triton.jit
def _rms_normed(x, weight_ptr, eps: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    return x * tl.rsqrt(tl.sum(x * x, 0) / d + eps) * tl.load(weight_ptr + lanes, lanes < d, 0.0)


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, PAIRS_A_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    pairs = tl.program_id(0).to(tl.int64) * PAIRS_A_HEAD + tl.arange(0, BLOCK // 2) % PAIRS_A_HEAD
    cos, sin = tl.load(cos_ptr + pairs), tl.load(sin_ptr + pairs)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))


@triton.jit
def _store_heads(x, out_ptr, d: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a row as [PARTS, rows, d / PARTS]."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    width: tl.constexpr = d // PARTS
    place = (lanes // width * rows + row) * width + lanes % width
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), lanes < d)


@triton.jit
def _heads_to_fp8(
    x_ptr, stride, scale_ptr, centre_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, rows,
    eps: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, ROTATED: tl.constexpr,
    CENTRED: tl.constexpr, HADAMARD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows. A tile [TILE * GROUP, D] holds GROUP heads of TILE rows, one head in each line.

    The tensor cores multiply a tile by the Hadamard matrix while the next tile is loaded, normed and rotated.
    """
    width: tl.constexpr = HEADS // PARTS
    lines, channels = tl.arange(0, TILE * GROUP), tl.arange(0, BLOCK)
    row, head = lines // GROUP, lines % GROUP
    matrix = _hadamard_matrix(BLOCK)
    start = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(start, start + ROWS, TILE):
        exists = row < rows - first
        x_here, cos_here, sin_here = x_ptr + first * stride, cos_ptr + first * (D // 2), sin_ptr + first * (D // 2)
        rms = tl.full((TILE * GROUP,), 1.0, tl.float32)
        if NORMED:
            squares = tl.zeros((TILE * GROUP, BLOCK), tl.float32)
            for group in tl.static_range(0, HEADS, GROUP):
                x = _tile(x_here + group * D, row * stride, exists & (head < HEADS - group), head, channels, D)
                squares += x * x
            total = tl.sum(tl.reshape(tl.sum(squares, 1), (TILE, GROUP)), 1, keep_dims=True)
            rms *= tl.reshape(tl.broadcast_to(tl.rsqrt(total / (HEADS * D) + eps), (TILE, GROUP)), (TILE * GROUP,))
        x = _prepared(
            x_here, stride, scale_ptr, centre_ptr, weight_ptr, cos_here, sin_here, row, exists, head, 0, channels, rms,
            HEADS, D, NORMED, ROTATED, CENTRED, HADAMARD,
        )  # fmt: skip
        for group in range(0, HEADS, GROUP):
            y = x
            if HADAMARD:
                y = tl.dot(x, matrix)
            x = _prepared(
                x_here, stride, scale_ptr, centre_ptr, weight_ptr, cos_here, sin_here, row, exists, head,
                group + GROUP, channels, rms, HEADS, D, NORMED, ROTATED, CENTRED, HADAMARD,
            )  # fmt: skip
            now = head + group
            place = (((now // width * rows + first + row) * width + now % width) * D)[:, None] + channels[None, :]
            place = tl.max_contiguous(tl.multiple_of(place, (1, 8)), (1, 8))  # stored in the layout of the loads
            mask = (exists & (now < HEADS))[:, None] & (channels < D)[None, :]
            tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask)  # values beyond +-448 become +-448


@triton.jit
def _prepared(
    x_ptr, stride, scale_ptr, centre_ptr, weight_ptr, cos_ptr, sin_ptr, row, exists, head, group, channels, rms,
    HEADS: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, ROTATED: tl.constexpr, CENTRED: tl.constexpr,
    HADAMARD: tl.constexpr,
):  # fmt: skip
    """Returns a tile after all steps before the Hadamard matrix, and divided by its heads' scales."""
    known = exists & (head < HEADS - group)
    scale = tl.load(scale_ptr + group + head, known, 1.0)
    factor = (D**-0.5 if HADAMARD else 1.0) / scale  # with the Hadamard matrix's own, which has ones and minus ones
    x = _tile(x_ptr + group * D, row * stride, known, head, channels, D) * (rms * factor)[:, None]
    if NORMED:
        x *= _tile(weight_ptr + group * D, 0, known, head, channels, D)
    if ROTATED:
        lines: tl.constexpr = x.shape[0]
        PAIRS: tl.constexpr = x.shape[1] // 2
        pairs = tl.arange(0, PAIRS)
        place, mask = (row * (D // 2))[:, None] + pairs[None, :], exists[:, None] & (pairs < D // 2)[None, :]
        cos, sin = tl.load(cos_ptr + place, mask, 1.0), tl.load(sin_ptr + place, mask, 0.0)
        even, odd = tl.split(tl.reshape(x, (lines, PAIRS, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
    if CENTRED:
        x -= _tile(centre_ptr + group * D, 0, known, head, channels, D) * factor[:, None]
    return x.to(tl.float16) if HADAMARD else x


@triton.jit
def _tile(ptr, first, exists, head, channels, D: tl.constexpr):
    """Loads one head of a row in each line, in float32; what does not exist is 0."""
    place, mask = (first + head * D)[:, None] + channels[None, :], exists[:, None] & (channels < D)[None, :]
    return tl.load(ptr + place, mask, 0.0).to(tl.float32)


@triton.jit
def _hadamard_matrix(D: tl.constexpr):
    """Returns the Hadamard matrix [D, D] of ones and minus ones in Sylvester's order, in float16; D is at most 256."""
    channels = tl.arange(0, D)
    common = channels[:, None] & channels[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float16)
