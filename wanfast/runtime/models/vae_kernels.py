"""These Triton kernels implement the functions of `vae_fused`.

Clips are channels-last, so the channels of a position are adjacent. The kernels are memory-bound. So each program loads
all channels of some positions, and loads each value only once.
Shapes: C channels, T frames, frames of h x w positions. A kernel takes one clip, without a batch dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_VALUES = 4096  # of a program


def rms_norm(x: Tensor, out: Tensor, gamma: Tensor, silu: bool) -> None:
    """Writes x / rms(x) * gamma into `out`; if `silu` is true, writes the SiLU of this product instead.

    x and `out` are [T, N, C] with N positions a frame. C must have stride 1; T and N may have any strides. rms(x) is
    taken over C.
    """
    frames, positions, channels = x.shape
    _check_channels(x, out)
    lanes = triton.next_power_of_2(channels)
    rows = max(1, _VALUES // lanes)
    _rms_norm[(triton.cdiv(positions, rows), frames)](
        x, out, gamma, positions, *x.stride()[:2], *out.stride()[:2], channels, silu, ROWS=rows, LANES=lanes
    )


def upsample(x: Tensor, out: Tensor, rate: int) -> None:
    """Writes each value of x [T, h, w, rate * C] to 2x2 positions of `out` [T * rate, 2h, 2w, C].

    Each frame of x becomes `rate` frames of `out`, one frame for each group of C channels. x is contiguous. Each frame
    of `out` is contiguous too, but the stride from frame to frame may be any.
    """
    frames, height, width, channels = x.shape
    assert x.is_contiguous() and out[0].is_contiguous(), f"frames must be contiguous: {x.stride()}, {out.stride()}"
    channels //= rate
    lanes = triton.next_power_of_2(channels)
    rows = max(1, _VALUES // lanes)
    grid = (triton.cdiv(width, rows), height, frames * rate)
    _upsample[grid](x, out, height, width, out.stride(0), rate, channels, ROWS=rows, LANES=lanes)


def _check_channels(*tensors: Tensor) -> None:
    for tensor in tensors:
        adjacent = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        assert adjacent, f"the channels of a position must be adjacent, not of strides {tensor.stride()}"


@triton.jit
def _rms_norm(
    x_ptr, out_ptr, gamma_ptr, positions, x_frame, x_stride, out_frame, out_stride,
    channels: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    mask = (rows < positions) & (lanes < channels)
    x = tl.load(x_ptr + frame * x_frame + rows * x_stride + lanes, mask, 0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1, keep_dims=True)), 1e-12)
    gamma = tl.load(gamma_ptr + lanes, lanes < channels, 0.0).to(tl.float32)
    x *= (channels**0.5 / norm) * gamma
    if SILU:
        x *= tl.sigmoid(x)
    tl.store(out_ptr + frame * out_frame + rows * out_stride + lanes, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _upsample(
    x_ptr, out_ptr, height, width, out_frame_stride,
    rate: tl.constexpr, channels: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, out_frame = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    frame, phase = out_frame // rate, out_frame % rate
    lanes = tl.arange(0, LANES)[None, :]
    mask = (columns < width) & (lanes < channels)
    position = (frame * height + row) * width + columns
    x = tl.load(x_ptr + position * rate * channels + phase * channels + lanes, mask, 0.0)
    first = out_frame * out_frame_stride + (2 * row * 2 * width + 2 * columns) * channels + lanes
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(out_ptr + first + (down * 2 * width + right) * channels, x, mask)
