"""Holds what the parity tests share: errors and likeness."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import torch
from torch import Tensor

from wanfast.quality.metrics import psnr


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Returns ||got - expected|| / ||expected|| in float64; NaN never passes a bound."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def likeness(got: Path | str, expected: Path | str) -> float:
    """Returns the PSNR of one mp4 to another, in dB."""
    one, two = (torch.from_numpy(iio.imread(file, plugin="pyav")).movedim(-1, 0) for file in (got, expected))
    return psnr(one / 127.5 - 1, two / 127.5 - 1)
