"""Holds what the parity tests share: random weights for every parameter, and errors."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import torch
from torch import Tensor, nn

from wanfast.quality.metrics import psnr


def randomise(module: nn.Module, seed: int) -> None:
    """Draws EVERY parameter, because a default of zero or one would hide an exchanged or unused tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean, std = spread_of(name, parameter.shape)
        value = mean + std * torch.randn(parameter.shape, generator=generator)
        parameter.data = value.to(parameter.dtype)


def spread_of(name: str, shape: torch.Size) -> tuple[float, float]:
    """Returns mean and standard deviation of a parameter's random values.

    Matrices keep the scale of their fan-in, vectors of norms stay near one, tables and biases are about 0.3.
    """
    if "norm" in name and name.endswith(("weight", "gamma")):
        return 1.0, 0.2
    if len(shape) >= 2 and "table" not in name and "modulation" not in name:
        return 0.0, shape[1:].numel() ** -0.5
    return 0.0, 0.3


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Returns ||got - expected|| / ||expected|| in float64; NaN never passes a bound."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def likeness(got: Path | str, expected: Path | str) -> float:
    """Returns the PSNR of one mp4 to another, in dB."""
    one, two = (torch.from_numpy(iio.imread(file, plugin="pyav")).movedim(-1, 0) for file in (got, expected))
    return psnr(one / 127.5 - 1, two / 127.5 - 1)
