"""Tests MagCache's plan: the published counts, each step, and where it differs from upstream."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest

from wanfast.runtime.config import magcache_settings
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Expert, MagCacheRule
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.sampling.magcache import (
    MagCacheSettings,
    ResidualCache,
    Skips,
    accumulated_error,
    plan_best,
    plan_skips,
    resample,
    residual_terms,
)
from wanfast.runtime.store.curves import published_curve, steps_of

RATIOS = [(prompt, negative) for prompt, negative in published_curve()["ratios"]]
STEPS = steps_of("unipc", 40, 5.0, A14B.boundary)
EXPERTS = [expert for expert, _ in STEPS]
LOW_ONLY: list[Expert] = ["low_noise"] * 8


def settings(name: str, rule: MagCacheRule = "low-noise-only") -> MagCacheSettings:
    return MagCacheSettings(*magcache_settings(name), rule)


def plan(name: str, rule: MagCacheRule, *, joint: bool = False) -> list[Skips]:
    return plan_skips(RATIOS, EXPERTS, settings(name, rule), joint=joint)


def strip(skips: list[Skips]) -> str:
    """Returns a letter per step: c computed, . skipped, p or n if only this branch is computed."""
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
def test_skipped_calls_of_80_are_the_published_ones(name: str, rule: MagCacheRule, skipped: int) -> None:
    assert len(RATIOS) == len(EXPERTS) == 40
    assert sum(map(sum, plan(name, rule))) == skipped


def test_no_residual_is_used_by_the_other_expert() -> None:
    """The first step of each expert is computed for any ratios and retention."""
    ones = [(1.0, 1.0)] * 40
    high = EXPERTS.count("high_noise")
    for rule in ("low-noise-only", "both-experts"):
        skips = plan_skips(ones, EXPERTS, MagCacheSettings(1.0, 100, 0.0, rule))
        assert skips[0] == skips[high] == (False, False)
        assert skips[high + 1 :] == [(True, True)] * (39 - high) or rule == "both-experts"
    before = [(0.5, 0.5)] * high + ones[high:]  # an error sum that continued would prevent skips after the switch
    both = MagCacheSettings(0.1, 2, 0.0, "both-experts")
    assert plan_skips(before, EXPERTS, both)[high:] == plan_skips(ones, EXPERTS, both)[high:]


def test_jointly_both_branches_skip_or_none() -> None:
    alone, joint = plan("E012K2R20", "both-experts"), plan("E012K2R20", "both-experts", joint=True)
    assert all(first == second for first, second in joint)
    assert any(first != second for first, second in alone)
    apart = [(1.0, 1.0), (1.0, 0.5), (1.0, 1.0)]
    skips = plan_skips(apart, LOW_ONLY[:3], MagCacheSettings(0.1, 2, 0.0), joint=True)
    assert skips == [(False, False), (False, False), (True, True)]


def test_errors_add_up_and_skips_in_a_row_are_few() -> None:
    skips = plan_skips([(0.9, 0.98)] * 8, LOW_ONLY, MagCacheSettings(0.25, 3, 0.0))
    # 0.9: errors 0.1 and 0.19 make 0.29; 0.98: three small errors, then the limit
    assert [first for first, _ in skips] == [False, True, False, True, False, True, False, True]
    assert [second for _, second in skips] == [False, True, True, True, False, True, True, True]


def test_names_of_settings() -> None:
    assert magcache_settings("E012K2R20") == (0.12, 2, 0.2)
    assert magcache_settings("E120K10R05") == (1.2, 10, 0.05)
    for name in ("E12", "E24K2R10", "e012k2r20", "E012K2R200", ""):
        assert magcache_settings(name) is None


def test_without_guidance_only_the_prompt_has_calls() -> None:
    ratios = [(0.99, 0.5)] * 8  # the second branch does not exist and would never skip
    for joint in (False, True):
        skips = plan_skips(ratios, LOW_ONLY, MagCacheSettings(0.1, 1, 0.0), joint=joint, guided=[False] * 8)
        assert skips == [(step % 2 == 1, False) for step in range(8)]
        best = plan_best(ratios, LOW_ONLY, MagCacheSettings(0.1, 2, 0.0), 5, joint=joint, guided=[False] * 8)
        assert sum(map(sum, best)) == sum(first for first, _ in best) == 5


@pytest.mark.parametrize("joint", [False, True])
def test_the_best_plan_is_the_best_of_all(joint: bool) -> None:
    """The best plan equals the best of all plans that the limits allow."""
    generator = random.Random(1)
    experts: list[Expert] = ["high_noise"] * 3 + ["low_noise"] * 4
    for in_a_row in (1, 2, 9):
        ratios = [(generator.uniform(0.8, 1.05), generator.uniform(0.8, 1.05)) for _ in experts]
        limits = MagCacheSettings(9.0, in_a_row, 0.0, "both-experts")
        choices = [(False, False), (True, True)] if joint else list(itertools.product((False, True), repeat=2))
        least: dict[int, float] = {}
        for every in itertools.product(choices, repeat=7):
            rows = [strip([(skip[branch],) * 2 for skip in every]) for branch in (0, 1)]
            if any(row[0] + row[3] != "cc" or "." * (in_a_row + 1) in row for row in rows):
                continue  # an expert's first step, or too many skips in a row
            skipped, error = sum(map(sum, every)), accumulated_error(ratios, every)
            least[skipped] = min(error, least.get(skipped, 9.0))
        for skipped, error in least.items():
            found = plan_best(ratios, experts, limits, skipped, joint=joint)
            assert sum(map(sum, found)) == skipped
            assert accumulated_error(ratios, found) == pytest.approx(error)
        with pytest.raises(ConfigError, match=f"at most {max(least)} forwards"):
            plan_best(ratios, experts, limits, max(least) + 2, joint=joint)


@pytest.mark.parametrize("name", ["E004K2R20", "E006K2R10", "E012K2R20"])
@pytest.mark.parametrize("rule", ["low-noise-only", "both-experts"])
def test_the_best_plan_is_no_worse_than_the_greedy_one(name: str, rule: MagCacheRule) -> None:
    greedy = plan(name, rule)
    best = plan_best(RATIOS, EXPERTS, settings(name, rule), sum(map(sum, greedy)))
    assert sum(map(sum, best)) == sum(map(sum, greedy))
    better = accumulated_error(RATIOS, best) - accumulated_error(RATIOS, greedy)
    assert better <= 1e-12
    if (name, rule) == ("E012K2R20", "both-experts"):
        assert better < -0.01  # so the two plans are not always the same


# E012K2R20 with the published curve, interpolated: high noise | low noise. c: computed; .: skipped; p, n: only this
# branch is computed. First by low-noise-only, then by both-experts.
GOLDEN = {
    (20, 3.0): ("ccccc|ccc..c..c.c.ccc", "c..c.|cccp.np.c.c.ccc"),
    (20, 5.0): ("cccccccc|cc..c..c.ccc", "cp.np.np|ccp.np.c.ccc"),
    (30, 3.0): ("cccccccc|cccc..c..c..c.c.c.c.cc", "cp.np.np|ccccp.np.np.npnpnpnpcc"),
    (30, 5.0): ("ccccccccccc|cccp.np.np.npnpnpcc", "cc..c..c..c|cccc..c..c..c.c.ccc"),
    (40, 3.0): ("cccccccccc|cccccc..c..c..c..c..c.c.c.c.cc", "cc..c..c..|ccccccp.np.np.np.np.npnpnpnpcc"),
    (40, 5.0): ("ccccccccccccccc|ccccc..c..c..c..c.c.c.ccc", "ccc..c..c..c..c|cccccp.np.np.np.npnpnpncc"),
    (50, 3.0): (
        "ccccccccccccc|ccccccc..c..c..c..c..c..c..c.c.c.c.cp",
        "ccp.np.np.np.|cccccccp.np.np.np.np.np.np.npnpnpnpnp",
    ),
    (50, 5.0): (
        "cccccccccccccccccc|cccccc..c..c..c..c..c..c.c.c.ccc",
        "cccp.np.np.np.np.n|ccccccp.np.np.np.np.np.npnpnpncc",
    ),
}


def by_calls(ratios: list[tuple[float, float]], high: int, rule: MagCacheRule) -> list[Skips]:
    """Implements E012K2R20 again, call by call like its source (WAN_SPEC 8.1), but error sums end with an expert."""
    calls, switch = 2 * len(ratios), 2 * high
    skipped, account = [], {}
    for call in range(calls):
        first = switch + (calls - switch) * 0.2
        retained = (
            call < int(first) if rule == "low-noise-only" else call < int(switch * 0.2) or switch <= call <= first
        )
        product, error, skips = account.get(call % 2, (1.0, 0.0, 0))
        product *= ratios[call // 2][call % 2]
        error, skips = error + abs(1 - product), skips + 1
        skip = not retained and call not in (0, 1, switch, switch + 1) and error < 0.12 and skips <= 2
        account[call % 2] = (product, error, skips) if skip else (1.0, 0.0, 0)
        skipped.append(skip)
    return list(zip(skipped[::2], skipped[1::2], strict=True))


@pytest.mark.parametrize(("steps", "shift"), GOLDEN)
def test_plans_step_by_step_for_other_steps_and_shifts(steps: int, shift: float) -> None:
    to = steps_of("unipc", steps, shift, A14B.boundary)
    experts, high = [expert for expert, _ in to], sum(expert == "high_noise" for expert, _ in to)
    ratios = resample(RATIOS, STEPS, to)
    for rule, golden in zip(("low-noise-only", "both-experts"), GOLDEN[steps, shift], strict=True):
        skips = plan_skips(ratios, experts, settings("E012K2R20", rule))
        found = strip(skips)
        assert f"{found[:high]}|{found[high:]}" == golden
        assert skips == by_calls(ratios, high, rule)


def test_interpolation_is_within_an_expert_and_over_the_timestep() -> None:
    assert resample(RATIOS, STEPS, STEPS) == RATIOS
    # with every second step of an expert, a ratio is the product of two
    halves = [pair for expert in ("high_noise", "low_noise") for pair in [s for s in STEPS if s[0] == expert][::2]]
    every_second = [STEPS.index(step) for step in halves]
    first_low = next(index for index, (expert, _) in enumerate(halves) if expert == "low_noise")
    found = resample(RATIOS, STEPS, halves)
    assert found[0] == found[first_low] == (1.0, 1.0)
    for index, at in enumerate(every_second):
        if index not in (0, first_low):
            expected = [RATIOS[at - 1][branch] * RATIOS[at][branch] for branch in (0, 1)]
            assert found[index] == pytest.approx(expected, rel=1e-12)
    # between two timesteps, the residual's level lies on the line between theirs
    here, there = STEPS[20][1], STEPS[21][1]
    middle = (here + there) // 2
    between = resample(RATIOS, STEPS, [*STEPS[:21], ("low_noise", middle), *STEPS[21:]])
    share = (here - middle) / (here - there)
    assert between[21] == pytest.approx([ratio**share for ratio in RATIOS[21]])
    assert math.prod(of[0] for of in between[21:23]) == pytest.approx(RATIOS[21][0])
    timesteps = (900, 500, 500, 100)  # timesteps are whole numbers, so that two can be equal
    twice: list[tuple[Expert, int]] = [("low_noise", timestep) for timestep in timesteps]
    found = resample([(1.0, 1.0), (0.9, 0.9), (0.99, 0.99), (0.5, 0.5)], twice, twice[:2])
    assert found[1] == pytest.approx((0.9 * 0.99, 0.9 * 0.99))
    with pytest.raises(ConfigError, match="too few steps of the high-noise expert for an interpolation: 1, but"):
        resample(RATIOS[14:], STEPS[14:], STEPS)


def test_a_residual_is_kept_as_long_as_it_is_used() -> None:
    cache = ResidualCache([(False, False), (True, False), (True, True), (False, True), (False, False)])
    done = []
    for step in range(5):
        for branch in ("prompt", "negative_prompt"):
            if (residual := cache.reuse(step, branch)) is not None:
                done.append((step, residual))
            elif cache.wants(step, branch):
                cache.keep(step, branch, f"{branch} of {step}")
    assert done == [
        (1, "prompt of 0"),
        (2, "prompt of 0"),
        (2, "negative_prompt of 1"),
        (3, "negative_prompt of 1"),
    ]
    assert not any(cache._residuals.values())


LEVELS: list[tuple[Expert, float]] = [
    *((("high_noise", level)) for level in (1.0, 0.97, 0.93)),
    *((("low_noise", level)) for level in (0.8, 0.7, 0.5, 0.4, 0.2, 0.1)),
]


def test_a_residual_on_a_line_is_extrapolated_exactly() -> None:
    """Beyond two steps, and after a single step of an expert, the last residual is used again."""
    skipped = [False, False, True, False, True, False, True, True, True]
    cache = ResidualCache([(skip, False) for skip in skipped], LEVELS)
    held, most = {}, 0
    for step, (_, level) in enumerate(LEVELS):
        on_line = np.array([3 - 2 * level, 5 * level])
        if skipped[step]:
            got = cache.reuse(step, "prompt")
            last = 5 if step == 8 else 3 if step == 4 else step
            expected = np.array([3 - 2 * LEVELS[last][1], 5 * LEVELS[last][1]])
            assert np.allclose(got, expected, atol=1e-12), step
        elif cache.wants(step, "prompt"):
            cache.keep(step, "prompt", on_line)
            held[step] = on_line.copy()
        most = max(most, len(cache._residuals["prompt"]))
        assert all(np.array_equal(cache._residuals["prompt"][key], held[key]) for key in cache._residuals["prompt"])
    assert list(held) == [0, 1, 3, 5] and most == 2
    assert not cache._residuals["prompt"]


def test_the_terms_of_a_residual_add_up_to_one() -> None:
    terms = residual_terms(
        [False, False, True, True, False, True], [("low_noise", 1 - 0.1 * step) for step in range(6)]
    )
    assert terms and all(sum(weight for _, weight in of) == pytest.approx(1) for of in terms.values())
    assert any(len(of) == 2 for of in terms.values())


def test_a_thousand_steps_are_planned_at_once() -> None:
    ratios = [(0.98 + 0.0001 * (step % 7), 0.985) for step in range(1000)]
    experts: list[Expert] = ["high_noise"] * 400 + ["low_noise"] * 600
    started = time.process_time()
    skips = plan_best(ratios, experts, MagCacheSettings(0.1, 100, 0.2, "both-experts"), 900)
    assert sum(map(sum, skips)) == 900
    assert time.process_time() - started < 0.3  # 0.09 s; a loop over the rows took 0.5 s


@pytest.mark.parametrize("joint", [False, True])
def test_steps_that_always_run_are_never_skipped(joint: bool) -> None:
    """They are steps that the plan would skip otherwise."""
    wide = settings("E048K2R20", "both-experts")
    free = plan_skips(RATIOS, EXPERTS, wide, joint=joint)
    always = [step for step, skips in enumerate(free) if all(skips)][::2]
    assert len(always) > 4
    greedy = plan_skips(RATIOS, EXPERTS, wide, joint=joint, always=always)
    best = plan_best(RATIOS, EXPERTS, wide, 20, joint=joint, always=always)
    for found in (greedy, best):
        assert sum(map(sum, found)) >= 20
        assert not any(any(found[step]) for step in always)
