"""The plan of MagCache: the published counts, step by step, and what upstream gets wrong."""

from __future__ import annotations

import pytest

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.model_spec import A14B
from wanfast.runtime.sampling.magcache import MagCacheSettings, Rule, Skips, plan_skips, published_curve
from wanfast.runtime.sampling.scheduler import expert_of, schedule

# E012K2R20: c computed, . skipped, p and n the branch that alone is computed
LOW = "cccccccccccccccccccc..c..c..c..c.c.c.ccc"
BOTH = "ccc..c..c..c..ccccccp.np.np.np.npnpnpncc"
EXPERTS = [expert_of(step.timestep, A14B.boundary) for step in schedule("unipc", 40, 5.0)]


def plan(name: str, rule: Rule, *, joint: bool = False) -> list[Skips]:
    return plan_skips(published_curve(), EXPERTS, MagCacheSettings.parse(name), rule, joint=joint)


def strip(skips: list[Skips]) -> str:
    """A letter a step: computed, skipped, or which branch alone is computed."""
    return "".join({(False, False): "c", (True, True): ".", (False, True): "p", (True, False): "n"}[s] for s in skips)


@pytest.mark.parametrize(
    ("name", "rule", "skipped"),
    [
        ("E004K2R20", "low-noise-only", 14),
        ("E006K2R20", "low-noise-only", 18),
        ("E006K2R10", "low-noise-only", 21),
        ("E012K2R20", "low-noise-only", 22),
        ("E012K2R10", "low-noise-only", 26),
        ("E004K2R20", "both-experts", 30),
        ("E006K2R20", "both-experts", 33),
        ("E012K2R20", "both-experts", 38),
    ],
)
def test_skipped_calls_of_80_are_the_published_ones(name: str, rule: Rule, skipped: int) -> None:
    assert len(published_curve()) == len(EXPERTS) == 40
    assert sum(map(sum, plan(name, rule))) == skipped


def test_plans_step_by_step() -> None:
    assert strip(plan("E012K2R20", "low-noise-only")) == LOW
    assert strip(plan("E012K2R20", "both-experts")) == BOTH


def test_no_residual_is_used_by_the_other_expert() -> None:
    """Nor by nobody: the first step of each expert is computed, whatever the ratios and the retention."""
    ones = [(1.0, 1.0)] * 40
    high = EXPERTS.count("high_noise")
    for rule in ("low-noise-only", "both-experts"):
        skips = plan_skips(ones, EXPERTS, MagCacheSettings(1.0, 100, 0.0), rule)
        assert skips[0] == skips[high] == (False, False)
        assert skips[high + 1 :] == [(True, True)] * (39 - high) or rule == "both-experts"
    before = [(0.5, 0.5)] * high + ones[high:]  # an account that went on would still owe for these
    settings = MagCacheSettings(0.1, 2, 0.0)
    assert (
        plan_skips(before, EXPERTS, settings, "both-experts")[high:]
        == plan_skips(ones, EXPERTS, settings, "both-experts")[high:]
    )


def test_jointly_both_branches_skip_or_none() -> None:
    alone, joint = plan("E012K2R20", "both-experts"), plan("E012K2R20", "both-experts", joint=True)
    assert all(first == second for first, second in joint)
    assert any(first != second for first, second in alone)
    apart = [(1.0, 1.0), (1.0, 0.5), (1.0, 1.0)]
    skips = plan_skips(apart, ["low_noise"] * 3, MagCacheSettings(0.1, 2, 0.0), "low-noise-only", joint=True)
    assert skips == [(False, False), (False, False), (True, True)]


def test_errors_add_up_and_skips_in_a_row_are_few() -> None:
    ratios, low = [(0.9, 0.98)] * 8, ["low_noise"] * 8
    skips = plan_skips(ratios, low, MagCacheSettings(0.25, 3, 0.0), "low-noise-only")
    # 0.9: errors 0.1 and 0.19 make 0.29; 0.98: three small ones, then the limit
    assert [first for first, _ in skips] == [False, True, False, True, False, True, False, True]
    assert [second for _, second in skips] == [False, True, True, True, False, True, True, True]


def test_names_of_settings() -> None:
    assert MagCacheSettings.parse("E012K2R20") == MagCacheSettings(0.12, 2, 0.2)
    for name in ("E12", "e012k2r20", "E012K2R200", ""):
        with pytest.raises(ConfigError, match="--magcache"):
            MagCacheSettings.parse(name)
