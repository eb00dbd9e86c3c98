"""Computes full-reference and no-reference metrics of a video, in plain torch.

PSNR, SSIM and MS-SSIM compare the video with a reference. SSIM is averaged over the frames; MS-SSIM combines SSIM
values at up to five resolutions. Flicker and motion need no reference: they measure how much pixels change from frame
to frame.

Shapes: F frames of H x W, videos [3, F, H, W] in [-1, 1].
Sources: Wang et al. 2004 (SSIM: 11x11 Gaussian window, sigma 1.5, K = 0.01, 0.03); Wang et al. 2003 (MS-SSIM weights).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 8  # frames
_MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(video: Tensor, reference: Tensor) -> float:
    """Returns the PSNR in decibels, from the mean squared error over all pixels; infinite for equal videos.

    Raises ValueError if the shapes differ, or if H or W is less than 11 pixels.
    """
    _check_shapes(video, reference)
    error = (_unit(video) - _unit(reference)).square().mean()
    return float(-10 * error.log10())


def ssim(video: Tensor, reference: Tensor) -> float:
    """Returns the structural similarity, averaged over pixels, channels and frames; 1 for equal videos.

    Raises ValueError if the shapes differ, or if H or W is less than 11 pixels.
    """
    return float(_factors(video, reference, 1))


def ms_ssim(video: Tensor, reference: Tensor) -> float:
    """Returns the multi-scale SSIM; 1 for equal videos.

    Each scale halves the resolution. Up to five scales are used: those at which an 11-pixel window fits into a frame.
    The weights of the used scales are normalised to sum to 1. Raises ValueError if the shapes differ, or if H or W is
    less than 11 pixels.
    """
    scales = max(1, min(len(_MS_WEIGHTS), (min(video.shape[-2:]) // 11).bit_length()))
    weights = torch.tensor(_MS_WEIGHTS[:scales], dtype=torch.float64)
    factors = _factors(video, reference, scales).cpu().clamp_min(0)
    return float(factors.pow(weights / weights.sum()).prod())


def _factors(video: Tensor, reference: Tensor, scales: int) -> Tensor:
    """Returns [scales]: the mean contrast-structure factor at each scale, and the mean SSIM at the last one.

    A few frames are compared at a time, because their maps take many times their memory.
    """
    _check_shapes(video, reference)
    sums = torch.zeros(scales, dtype=torch.float64, device=video.device)
    for first in range(0, video.shape[1], _BLOCK):
        one, other = (clip[:, first : first + _BLOCK] for clip in (video, reference))
        x, y = _frames(one), _frames(other)
        for scale in range(scales):
            luminance_too, contrast_and_structure = _ssim_maps(x, y)
            factor = luminance_too if scale == scales - 1 else contrast_and_structure
            sums[scale] += factor.mean() * one.shape[1]
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return sums / video.shape[1]


def flicker(video: Tensor) -> float:
    """Returns how unevenly pixels change over time.

    The result is the mean of |a - 2b + c|, where a, b and c are the values of a pixel in three successive frames. A
    value is 0 for black and 255 for white. The result is 0 if every pixel changes at a constant rate, or if there are
    fewer than three frames.
    """
    return float((_unit(video).diff(n=2, dim=1).abs().mean()) * 255) if video.shape[1] > 2 else 0.0


def motion(video: Tensor) -> float:
    """Returns the mean absolute difference between the values of a pixel in two successive frames.

    A value is 0 for black and 255 for white. The result is 0 if there is only one frame.
    """
    return float((_unit(video).diff(dim=1).abs().mean()) * 255) if video.shape[1] > 1 else 0.0


def _check_shapes(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or min(video.shape[-2:]) < 11:
        raise ValueError(
            f"videos of {list(video.shape)} and {list(reference.shape)}: their shapes must be equal, with at least 11 "
            "pixels a side"
        )


def _unit(video: Tensor) -> Tensor:
    return (video.double().clamp(-1, 1) + 1) / 2


def _frames(video: Tensor) -> Tensor:
    """Returns [3*F, 1, H, W]: each channel of each frame as a separate image."""
    return _unit(video).flatten(0, 1).unsqueeze(1)


def _sliding(window: Tensor, side: int) -> Tensor:
    """Returns the matrix [side - len(window) + 1, side] that applies the window at each place where it fits."""
    matrix = window.new_zeros(side - len(window) + 1, side)
    for place, value in enumerate(window):
        matrix.diagonal(place).fill_(value)
    return matrix


def _ssim_maps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns SSIM and its contrast-structure factor, at each pixel where the window fits."""
    c1, c2 = 0.01**2, 0.03**2
    taps = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-taps.square() / (2 * 1.5**2)).to(x.device)
    window = window / window.sum()

    # On a CPU, convolutions of float64 take four times as long as products with banded matrices.
    rows, columns = (_sliding(window, side) for side in x.shape[-2:])

    def blur(image: Tensor) -> Tensor:
        return rows @ image @ columns.T

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * contrast_structure, contrast_structure
