"""Each function here is one pass over a channels-last clip, between two convolutions of the VAE.

A pass computes in float32 and rounds once. Each function has a formula in plain PyTorch and a Triton kernel in
`vae_kernels`. For inference on a GPU, the kernel runs; in all other cases, the formula runs. The tests compare the
formula with the kernel.
Shapes: B batch, C channels, T frames, h w height and width of any grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.kernels import HAS_KERNELS

if HAS_KERNELS:
    from wanfast.runtime.models import vae_kernels

_TINIEST = 1e-12  # so that a position of zeros has a norm


def rms_norm(x: Tensor, gamma: Tensor, *, silu: bool = False) -> Tensor:
    """Returns x / rms(x) * gamma; if `silu` is true, returns the SiLU of this product.

    x is [B,C,...], and gamma is [C,...]. rms(x) is taken over C.
    """
    if _by_kernel(x):
        out = torch.empty_like(x)
        vae_kernels.rms_norm(_positions(x), _positions(out), gamma.flatten(), silu)
        return out
    return _formula(x, gamma, silu).to(x.dtype)


def rms_norm_silu_into(out: Tensor, x: Tensor, gamma: Tensor) -> None:
    """Writes SiLU(rms_norm(x)) of x [B,C,T,h,w] into the first C channels of `out` [B,C+n,T,h,w], n >= 0."""
    if _by_kernel(x):
        vae_kernels.rms_norm(_positions(x), _positions(out), gamma.flatten(), True)
    else:
        out[:, : x.shape[1]] = _formula(x, gamma, True)


def upsample(x: Tensor, rate: int, halo: int = 0) -> Tensor:
    """Maps x [B,rate*C,T,h,w] to [B,C,rate*T,2h+2*halo,2w].

    Each value is copied to 2x2 positions, and each group of C channels becomes a frame. The first and last `halo` rows
    of the result are left uninitialised.
    """
    batch, channels, frames, height, width = x.shape
    sizes = (batch, channels // rate, frames * rate, 2 * height + 2 * halo, 2 * width)
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    own = out[:, :, :, halo : halo + 2 * height]
    if _by_kernel(x):
        vae_kernels.upsample(x[0].permute(1, 2, 3, 0), own[0].permute(1, 2, 3, 0), rate)
        return out
    apart = rearrange(x, "b (r c) t h w -> (b t r) c h w", r=rate)
    doubled = F.interpolate(apart, scale_factor=2, mode="nearest-exact")
    own.copy_(rearrange(doubled, "(b t) c h w -> b c t h w", b=batch))
    return out


def _formula(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(_TINIEST)
    normed = (x * (x.shape[1] ** 0.5 / norm)).mul_(gamma)
    return F.silu(normed, inplace=True) if silu else normed


def _positions(x: Tensor) -> Tensor:
    """Returns a channels-last [1,C,T,h,w] as [T, h*w, C], or [1,C,h,w] as [1, h*w, C].

    The result is a view, because kernels write into it. Raises RuntimeError if the rows of x are not adjacent.
    """
    rows = x[0].movedim(0, -1)
    frames, height, width, channels = rows.shape if rows.dim() == 4 else (1, *rows.shape)
    return rows.view(frames, height * width, channels)


def _by_kernel(x: Tensor) -> bool:
    return HAS_KERNELS and x.is_cuda and x.shape[0] == 1 and not torch.is_grad_enabled()
