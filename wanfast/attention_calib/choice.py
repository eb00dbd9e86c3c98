"""Chooses the density of each head, layer and band from the errors that were measured on all clips.

This module does not import torch.
Shapes: C clips, B bands, L layers, H heads, E densities of the ladder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from wanfast.runtime.facts.densities import LADDER


def is_whole(measured: dict[str, Any], shape: tuple[int, int, int]) -> bool:
    """Returns whether a clip's measurements hold a number for each of (bands, layers, heads) and each density."""
    try:
        errors = np.array(measured["errors"], dtype=float)
    except (KeyError, TypeError, ValueError):
        return False
    return errors.shape == (*shape, len(LADDER)) and bool(np.isfinite(errors).all())


def chosen(measured: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Returns, as a JSON document, the least densities whose error is at most `target` in every clip.

    A clip's error is the mean over the calls of a band. A head without such a density is dense, and has no error. The
    document holds the errors of the whole ladder too: of each head the largest over the clips, and the mean of all.
    """
    errors_CBLHE = np.array([clip["errors"] for clip in measured])
    worst = errors_CBLHE.max(axis=0)
    fits = worst <= target
    first = np.where(fits.any(-1), fits.argmax(-1), len(LADDER))  # the index of the density, or one more
    with_dense = np.append(errors_CBLHE, np.zeros((*errors_CBLHE.shape[:-1], 1)), axis=-1)
    own = np.take_along_axis(with_dense, np.broadcast_to(first, errors_CBLHE.shape[:-1])[..., None], axis=-1)
    densities = np.array([*LADDER, math.nan])[first]
    return {
        "densities": [
            [[None if math.isnan(d) else d for d in heads] for heads in layers] for layers in densities.tolist()
        ],
        "target_error": target,
        "mean_error": round(float(own.mean()), 6),
        "largest_error": round(float(own.max()), 6),
        "ladder": [
            {"density": density, "mean_error": round(float(errors_CBLHE[..., rung].mean()), 6)}
            for rung, density in enumerate(LADDER)
        ],
        "errors": worst.tolist(),
    }
