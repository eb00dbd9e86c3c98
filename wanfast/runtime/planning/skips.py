"""Chooses the forwards of a video that MagCache skips.

One of three options decides how many: --magcache-thresh limits the predicted error, --magcache-budget is the share of
forwards to compute, and --magcache-skip is the number of forwards to skip.
The choice depends only on the arguments, so that all ranks skip the same forwards.
This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from wanfast.runtime.config.skipping import SkippingConfig
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.sampling.magcache import MagCacheSettings, Ratios, Skips, plan_best, plan_skips


def planned_skips(
    skipping: SkippingConfig,
    ratios: Ratios,
    experts: Sequence[Expert],
    guided: Sequence[bool],
    always: Sequence[int],
    *,
    joint: bool,
) -> list[Skips]:
    """Returns for each step and branch whether the forward is skipped.

    `ratios`, `experts` and `guided` have one entry for each step: the curve's ratios, the expert, and whether the
    negative prompt's branch runs. `always`: the steps that are never skipped. `joint`: whether both branches skip the
    same forwards. Raises ConfigError if --magcache-budget or --magcache-skip cannot be met.
    """
    s = skipping
    assert s.magcache_k is not None and s.retention_ratio is not None and s.magcache_rule is not None
    threshold = s.magcache_thresh or 0.0  # a budget has no threshold
    settings = MagCacheSettings(threshold, s.magcache_k, s.retention_ratio, s.magcache_rule)
    steps = tuple(ratios), tuple(experts), tuple(guided), tuple(always)  # tuples, so that the choice is cached
    if s.magcache_thresh is not None:
        return list(_chosen(*steps, settings, None, True, joint))
    option, wanted = f"--magcache-skip {s.magcache_skip}", s.magcache_skip
    if wanted is None:
        budget, num_forwards = s.magcache_budget or 0.0, sum(1 + both for both in guided)
        option, wanted = f"--magcache-budget {budget:g}", int((1 - budget) * num_forwards + 1e-9)
    exactly = s.magcache_skip is not None
    try:
        return list(_chosen(*steps, settings, wanted, exactly, joint))
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


@lru_cache(maxsize=64)
def _chosen(
    ratios: Ratios,
    experts: Sequence[Expert],
    guided: Sequence[bool],
    always: Sequence[int],
    settings: MagCacheSettings,
    wanted: int | None,
    exactly: bool,
    joint: bool,
) -> Sequence[Skips]:
    """Returns the skips by the threshold, or the `wanted` number of skips; planned once for all lines of a list."""
    if wanted is None:
        return plan_skips(ratios, experts, settings, joint=joint, guided=guided, always=always)
    return plan_best(ratios, experts, settings, wanted, exactly=exactly, joint=joint, guided=guided, always=always)
