"""MagCache: which forwards of a generation are skipped, worked out before it begins.

What the blocks of an expert add to the stream, its residual, changes little from step to step over most of the
schedule: its norm falls by a ratio near one. A call is skipped, and the residual of the last computed call used again,
while the error that the ratios foretell stays under a threshold. The ratios are measured once (a curve), so that the
decisions follow from numbers known beforehand: the plan is one pure function, the same on every rank.

Each branch of guidance has calls, residuals and an account of its own. A residual never outlives its expert.
Cost: a residual of each branch, [L, d]. Limit: the curve is that of a model, its steps and its shift.
Source: MagCache (arXiv 2506.09045), section 3.3; the two rules are its program's for Wan2.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanfast.runtime.config import Expert
from wanfast.runtime.errors import ConfigError

_CURVES = Path(__file__).parents[2] / "assets" / "magcache"

Rule = Literal["low-noise-only", "both-experts"]
Skips = tuple[bool, bool]  # of one step: the prompt's branch, the negative prompt's


@dataclass(frozen=True)
class MagCacheSettings:
    """When to stop skipping, and where not to begin."""

    threshold: float  # of the accumulated error
    max_skips: int  # of one branch in a row
    retention: float  # share of an expert's calls, the first ones, that are always computed

    @classmethod
    def parse(cls, name: str) -> MagCacheSettings:
        """E012K2R20 is threshold 0.12, at most 2 skips in a row, the first 20 %. Raises ConfigError."""
        match = re.fullmatch(r"E(\d)(\d+)K(\d+)R(\d{2})", name)
        if match is None:
            raise ConfigError(f"--magcache {name}: write thresholds as in E012K2R20, or name a curve")
        whole, rest, skips, retention = match.groups()
        return cls(float(f"{whole}.{rest}"), int(skips), int(retention) / 100)


def plan_skips(
    ratios: Sequence[tuple[float, float]],
    experts: Sequence[Expert],
    settings: MagCacheSettings,
    rule: Rule,
    *,
    joint: bool = False,
) -> list[Skips]:
    """Of each step, whether each branch is skipped.

    ratios: of each step and branch, the residual's norm over that of the step before.
    experts: at work in each step.
    joint: both branches or none, where two halves of the ranks would else wait for each other.
    """
    high = sum(expert == "high_noise" for expert in experts)
    accounts = (_Account(settings), _Account(settings))
    plan: list[Skips] = []
    for step, of_step in enumerate(ratios):
        if step in (0, high):
            accounts = (_Account(settings), _Account(settings))  # the first of an expert: there is nothing to use again
        first, second = (
            step not in (0, high)
            and not _is_retained(2 * step + branch, 2 * high, 2 * len(ratios), settings.retention, rule)
            and accounts[branch].can_skip(of_step[branch])
            for branch in (0, 1)
        )
        skips = (first and second,) * 2 if joint else (first, second)
        for account, ratio, skip in zip(accounts, of_step, skips, strict=True):
            account.book(ratio, skip)
        plan.append(skips)
    return plan


def _is_retained(call: int, high_calls: int, calls: int, retention: float, rule: Rule) -> bool:
    """Whether a call, counted over both branches, is among the first ones that are always computed."""
    low_calls = calls - high_calls
    if rule == "low-noise-only":
        return call < int(high_calls + low_calls * retention)
    return call < int(high_calls * retention) or high_calls <= call <= high_calls + low_calls * retention


@dataclass
class _Account:
    """What a branch's skips in a row came to."""

    settings: MagCacheSettings
    product: float = 1.0  # of the ratios since the residual was computed
    error: float = 0.0
    skips: int = 0

    def can_skip(self, ratio: float) -> bool:
        error = self.error + abs(1 - self.product * ratio)
        return error < self.settings.threshold and self.skips < self.settings.max_skips

    def book(self, ratio: float, skip: bool) -> None:
        if skip:
            self.product *= ratio
            self.error += abs(1 - self.product)
            self.skips += 1
        else:
            self.product, self.error, self.skips = 1.0, 0.0, 0


def published_curve() -> list[tuple[float, float]]:
    """The ratios of Wan2.2-I2V-A14B as its makers published them: 40 steps, shift 5, boundary 0.9."""
    document = json.loads((_CURVES / "wan2.2-i2v-a14b.json").read_text(encoding="utf-8"))
    return [(prompt, negative_prompt) for prompt, negative_prompt in document["ratios"]]
