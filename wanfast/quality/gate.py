"""This module says which ways of lossy attention a recipe may use, from what the tiny model's videos show.

A way passes if three conditions hold. Its share of followed prompts is not below the 95 % interval of dense attention's
share. Its videos have a mean SSIM of at least `LEAST_SSIM` to the videos of dense attention. The sampled error of its
heads, averaged over all heads and videos, is at most `TARGET_ERROR`, the default target of a calibration.
Limits: the interval is wide if there are few videos. In the tiny model, a query attends to few keys, so that the errors
of larger models may differ.
"""

from __future__ import annotations

from typing import Any

from wanfast.runtime.facts.densities import TARGET_ERROR

LEAST_SSIM = 0.95  # to the video of dense attention, the mean over all pairs


def gate(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, bool]:
    """Returns which conditions a way of attention meets, and whether the way meets all of them.

    `row` and `dense`: the metrics of this way, and the metrics of dense attention.
    """
    lowest_share, _ = dense["prompt_following"]["95%"]
    met = {
        "prompts": row["prompt_following"]["share"] >= lowest_share,
        "SSIM": row["ssim_dense"] >= LEAST_SSIM,
        "error": row["mean_error"] <= TARGET_ERROR,
    }
    return met | {"holds": all(met.values())}
