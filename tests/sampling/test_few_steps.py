"""Tests lists of noise levels and their solvers against formulas in float64, and that the grids did not change."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.config.video import parse_sigmas
from wanfast.runtime.facts.choices import RecipeName, Solver
from wanfast.runtime.sampling.scheduler import Integrator, Step, grid, listed, solve

Array = npt.NDArray[np.float64]
BOUNDARY = 0.9


def levels_of(name: RecipeName) -> list[float]:
    return list(parse_sigmas(RECIPES[name].options["sigmas"]))


def shifted(shift: float, *levels: float) -> list[float]:
    return [shift * level / (1 + (shift - 1) * level) for level in levels]


def velocity(x: Array, sigma: float) -> Array:
    """A smooth flow, so that every step has another velocity."""
    return np.tanh(x * (1.5 - sigma)) + 0.1 * np.roll(x, 1)


def integrated(solver: Solver, sigmas: list[float], num_high: int, noise: Array, fresh: Callable[[], Array]) -> Array:
    """Returns what our solver makes of the flow."""
    levels = listed(solver, sigmas)
    integrator = Integrator(solve(solver, levels, num_high), fresh)
    x = noise * levels.start
    for sigma in levels.sigmas[:-1]:
        x = integrator.advance(x, velocity(x, sigma))
    return x


def drawn(seed: int) -> Callable[[], Array]:
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal(50)


def rounded(sigmas: list[float]) -> list[float]:
    """The levels as float32 holds them, then 0."""
    return [*map(float, np.array(sigmas, np.float32)), 0.0]


@pytest.mark.parametrize(
    ("name", "levels", "high_and_low"),
    [
        ("lightning-4", shifted(5, 1, 0.75, 0.5, 0.25), (2, 2)),
        ("lightning-8", shifted(5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125), (3, 5)),
        ("rcm-4", [0.99502, 0.93378, 0.85290, 0.60898], (2, 2)),
        ("hybrid", [*shifted(5, *np.linspace(float(np.float32(0.999)), 0, 41)[:15]), 0.75, 0.5, 0.25], (15, 3)),
    ],
)
def test_levels_and_experts_of_the_recipes(
    name: RecipeName, levels: list[float], high_and_low: tuple[int, int]
) -> None:
    own = listed("euler", levels_of(name))
    assert own.sigmas == tuple(rounded(levels))
    assert own.timesteps == tuple(int(1000 * level) for level in levels)
    experts = own.experts(BOUNDARY)
    assert (experts.count("high_noise"), experts.count("low_noise")) == high_and_low
    assert RECIPES[name].options.get("switch_step", high_and_low[0]) == high_and_low[0]


def test_the_switch_by_index_is_not_the_boundary() -> None:
    """The levels of first-last-frame, distilled at shift 16, have three timesteps at the boundary or above."""
    levels = listed("euler", shifted(16, 1, 0.75, 0.5, 0.25))
    assert levels.timesteps == (1000, 979, 941, 842)
    assert levels.experts(BOUNDARY).count("high_noise") == 3
    assert levels.experts(BOUNDARY, 2) == ["high_noise", "high_noise", "low_noise", "low_noise"]
    assert levels.experts(BOUNDARY, 0) == ["low_noise"] * 4


@pytest.mark.parametrize("name", ["lightning-4", "lightning-8"])
def test_euler_on_a_list(name: RecipeName) -> None:
    noise = drawn(1)()
    sigmas, x = rounded(levels_of(name)), noise
    for here, after in itertools.pairwise(sigmas):
        x = x + (after - here) * velocity(x, here)
    got = integrated("euler", levels_of(name), 2, noise, drawn(2))
    assert np.abs(got - x).max() < 1e-12


@pytest.mark.parametrize("solver", ["rcm", "euler"])
def test_rcm_starts_at_its_first_level_and_draws_noise_in_each_step(solver: Solver) -> None:
    noise, fresh = drawn(1)(), drawn(2)
    sigmas = rounded(levels_of("rcm-4"))
    x = noise * sigmas[0]
    for here, after in itertools.pairwise(sigmas):
        v = velocity(x, here)
        x0 = x - here * v
        x = x + (after - here) * v if solver == "euler" else x0 if not after else (1 - after) * x0 + after * fresh()
    got = integrated(solver, levels_of("rcm-4"), 2, noise, drawn(2))
    assert np.abs(got - x).max() < 1e-12


def unipc(x: Array, sigmas: list[float]) -> Array:
    """UniPC of order 2 with B(h) = e^h - 1 and x0 prediction, as its paper states it; stops at the last level."""
    lam = [math.log((1 - s) / s) for s in sigmas]
    m: list[Array] = []
    corrected: list[Array] = []
    for i, s in enumerate(sigmas):
        m.append(x - s * velocity(x, s))
        if i == len(sigmas) - 1:
            return x
        if i >= 1:
            h = lam[i] - lam[i - 1]
            b = math.expm1(-h)
            base = s / sigmas[i - 1] * corrected[i - 1] - (1 - s) * b * m[i - 1]
            change = m[i] - m[i - 1]
            if i == 1:
                x = base - (1 - s) * b * 0.5 * change
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                g = b / -h - 1
                rhos = np.linalg.solve([[1, 1], [r, 1]], [g / b, 2 * (g / -h - 0.5) / b])
                x = base - (1 - s) * b * (rhos[0] * (m[i - 2] - m[i - 1]) / r + rhos[1] * change)
        corrected.append(x)
        after = sigmas[i + 1]
        h = lam[i + 1] - lam[i]
        b = math.expm1(-h)
        slope = 0.0 if i in (0, len(sigmas) - 2) else 0.5 * (m[i] - m[i - 1]) * h / (lam[i] - lam[i - 1])
        x = after / s * x - (1 - after) * b * (m[i] + slope)
    raise AssertionError("unreachable")


def test_hybrid_is_unipc_up_to_the_first_distilled_level_and_then_euler() -> None:
    noise, sigmas = drawn(1)(), rounded(levels_of("hybrid"))
    x = unipc(noise, sigmas[:16])
    for here, after in itertools.pairwise(sigmas[15:]):
        x = x + (after - here) * velocity(x, here)
    got = integrated("unipc-euler", levels_of("hybrid"), 15, noise, drawn(2))
    assert np.abs(got - x).max() < 1e-9


def test_hybrid_begins_with_the_steps_of_the_base_model() -> None:
    base = solve("unipc", grid("unipc", 40, 5.0), 40)
    hybrid = solve("unipc-euler", listed("unipc-euler", levels_of("hybrid")), 15)
    assert hybrid[:14] == base[:14]
    last, of_base = hybrid[14], base[14]
    assert (last.sigma, last.timestep, last.correction) == (of_base.sigma, of_base.timestep, of_base.correction)
    assert listed("unipc-euler", levels_of("hybrid")).start == grid("unipc", 40, 5.0).start == 1.0


@pytest.mark.parametrize(
    ("solver", "digest"), [("unipc", "5dba9ec807e5a4b6"), ("dpm++", "ebec96699c68b174"), ("euler", "46592da253dcaca7")]
)
def test_grids_are_what_they_were_before_lists(solver: Solver, digest: str) -> None:
    """The digest was taken before. Weights have 13 digits, because libraries may round logarithms otherwise."""

    def row(step: Step) -> tuple[object, ...]:
        c = step.correction
        weights = [step.sample, step.clean, step.clean_prev]
        weights += [c.sample_prev, c.clean_prev, c.clean_prev2, c.clean] if c else []
        return (step.sigma, step.timestep, *(f"{weight:.12e}" for weight in weights))

    rows = [
        [row(step) for step in solve(solver, grid(solver, steps, shift), steps)]
        for steps in (1, 2, 3, 4, 20, 40, 50)
        for shift in (1.0, 3.0, 5.0, 12.0)
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == digest
