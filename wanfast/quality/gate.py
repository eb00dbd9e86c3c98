"""This module says which kinds of lossy attention a recipe may use, from what the tiny model's videos show.

A recipe may use a kind of lossy attention if three conditions hold. First, the share of its videos that follow the
prompt is at least the lower end of the 95 % interval of dense attention's share. Second, its videos have a mean SSIM of
at least `LEAST_SSIM` to the videos of dense attention. Third, the sampled error, averaged over all heads and videos, is
at most `TARGET_ERROR`, the default target of a calibration.
Limits: the interval is wide if there are few videos. In the tiny model, a query attends to few keys, so that the errors
of larger models may differ.
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
