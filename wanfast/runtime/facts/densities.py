"""This module holds the plan of densities: how each head computes its self-attention in each band of steps.

A band is a span of successive steps of one expert. In a band, each head of each layer does one of three things. It
computes a share of the blocks, which is its density; or it is dense; or it computes all blocks in float8.
This module does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wanfast.runtime.facts.choices import Expert

LADDER = (0.15, 0.25, 0.35, 0.5, 0.75)  # the densities that a calibration tries; above them, a head is dense
TARGET_ERROR = 0.1  # the largest relative error of a head, unless a calibration is asked for another one
_BANDS = 2  # of an expert's steps
Density = float | Literal["fp8"] | None  # of a head; None is dense
# In float8, a head takes this share of the time of a dense one: 30.3 to 32 of 41 ms on an H100.
FP8_SHARE = 0.75
# What a head may be, the cheapest first; a list of three quarters of the blocks also has to be made.
CHOICES: tuple[Density, ...] = (*(density for density in LADDER if density < FP8_SHARE), "fp8", 0.75, None)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """This class describes a calibrated plan of densities: its artifact, its target error and its measured errors.

    An error is the relative error of a head's attention, compared with dense attention.
    """

    key: str  # of the artifact
    target_error: float
    mean_error: float  # of all heads; dense heads have none
    largest_error: float  # of a head in one clip, layer and band


@dataclass(frozen=True, kw_only=True)
class Densities:
    """This class holds the density of each head of each layer, for each band of steps."""

    bands: tuple[int, ...]  # the first step of each band, from 0
    by_band: tuple[tuple[tuple[Density, ...], ...], ...]  # [band][layer][head]
    calibrated: Calibrated | None = None

    @classmethod
    def uniform(cls, density: float, num_layers: int, num_heads: int, bands: tuple[int, ...] = (0,)) -> Densities:
        """Returns a plan in which all heads have the same `density` (a share from 0 to 1) in all steps.

        `bands`: the first step of each band, counted from 0.
        """
        return cls(bands=bands, by_band=(((density,) * num_heads,) * num_layers,) * len(bands))


def bands_of(experts: Sequence[Expert]) -> tuple[int, ...]:
    """Returns the first step of each band, counted from 0; the steps of each expert form two bands.

    The two bands are equally long, or the second is one step longer. A single step forms one band. `experts`: the
    expert of each step.
    """
    starts, start = [], 0
    for _, steps in itertools.groupby(experts):
        number = len([*steps])
        parts = min(_BANDS, number)
        starts += [start + part * number // parts for part in range(parts)]
        start += number
    return tuple(starts)
