"""Decides whether a recipe may use a kind of lossy attention, from measurements of the tiny model's videos.

The same videos are made with the lossy attention and with dense attention. Three conditions must hold:

* With lossy attention, the share of videos that follow their prompt is not below the 95 % confidence interval of the
  same share with dense attention.
* The mean SSIM between a video of lossy attention and the same video of dense attention is at least `LEAST_SSIM`.
* The mean error of lossy attention is at most `TARGET_ERROR`, the default target of a calibration. The error is that
  of the outputs of some queries, relative to exact outputs. The mean is taken over all heads and videos.

Limits: with few videos, the interval is wide, so that the first condition is weak. Larger models may have other errors,
because a query of the tiny model attends to few keys.
"""

from __future__ import annotations

from typing import Any

from wanfast.runtime.facts.densities import TARGET_ERROR

LEAST_SSIM = 0.95  # to the video of dense attention, the mean over all pairs


def gate(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, bool]:
    """Returns which of the module's three conditions a kind of lossy attention meets.

    `row` and `dense`: the metrics of the lossy attention, and the metrics of dense attention. The keys of the result
    are "prompts", "SSIM" and "error", one for each condition. A fourth key, "holds", is true if all three are met.
    """
    lowest_share, _ = dense["prompt_following"]["95%"]
    met = {
        "prompts": row["prompt_following"]["share"] >= lowest_share,
        "SSIM": row["ssim_dense"] >= LEAST_SSIM,
        "error": row["mean_error"] <= TARGET_ERROR,
    }
    return met | {"holds": all(met.values())}
