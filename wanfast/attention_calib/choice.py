"""Chooses dense, sparse or float8 attention for each head, layer and band, from the errors measured on all clips.

This module does not import torch.
Shapes: C clips, B bands, L layers, H heads, E measured choices: densities, and float8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wanfast.runtime.facts.densities import CHOICES, LADDER, Density


def is_whole(measured: dict[str, Any], shape: tuple[int, int, int], *, fp8: bool) -> bool:
    """Returns whether a clip's measurements hold an error for each band, layer, head and density.

    `shape`: the numbers of (bands, layers, heads).
    If `fp8` is true, the measurements must also hold an error in float8. If `fp8` is false, this error is optional.
    """
    try:
        errors = np.array(measured["errors"], dtype=float)
    except (KeyError, TypeError, ValueError):
        return False
    lengths = {len(LADDER) + 1} if fp8 else {len(LADDER), len(LADDER) + 1}
    return errors.shape in {(*shape, length) for length in lengths} and bool(np.isfinite(errors).all())


def chosen(measured: list[dict[str, Any]], target: float, *, fp8: bool) -> dict[str, Any]:
    """Chooses the cheapest attention for each head of each layer and band.

    A choice is a density of `LADDER` or, if `fp8` is true, float8. Each head gets the cheapest choice with an error of
    at most `target` in every clip. If there is no such choice, the head stays dense, and its error counts as 0.
    `measured` holds the results of `calibrate.measure`, one for each clip. Returns a JSON document:

    * "densities" [band][layer][head]: the head's choice: a density, "fp8", or None for a dense head.
    * "target_error": `target`.
    * "mean_error" and "largest_error": the mean and the largest error over all heads and clips, each head with its
      own choice.
    * "errors" [band][layer][head][choice]: the error of each possible choice in its worst clip. The choices stand in
      the order of "ladder".
    * "ladder": the possible choices, the cheapest first, each with its mean error over all heads and clips.
    """
    choices = [choice for choice in CHOICES if choice is not None and (fp8 or choice != "fp8")]
    columns = [(*LADDER, "fp8").index(choice) for choice in choices]  # as a clip's errors have them
    errors_CBLHE = np.stack([np.array(clip["errors"])[..., columns] for clip in measured])
    worst = errors_CBLHE.max(axis=0)
    fits = worst <= target
    first = np.where(fits.any(-1), fits.argmax(-1), len(choices))  # the index of the choice; behind them, dense
    with_dense = np.append(errors_CBLHE, np.zeros((*errors_CBLHE.shape[:-1], 1)), axis=-1)
    own = np.take_along_axis(with_dense, np.broadcast_to(first, errors_CBLHE.shape[:-1])[..., None], axis=-1)
    of_index: list[Density] = [*choices, None]
    return {
        "densities": [[[of_index[index] for index in heads] for heads in layers] for layers in first.tolist()],
        "target_error": target,
        "mean_error": round(float(own.mean()), 6),
        "largest_error": round(float(own.max()), 6),
        "ladder": [
            {"density": choice, "mean_error": round(float(errors_CBLHE[..., index].mean()), 6)}
            for index, choice in enumerate(choices)
        ],
        "errors": worst.tolist(),
    }
