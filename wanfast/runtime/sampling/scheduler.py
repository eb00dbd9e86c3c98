"""This module computes flow-matching solvers in closed form: noise levels, timesteps, and the weights of each step.

At noise level sigma, a flow model gets x = (1 - sigma) x0 + sigma noise and predicts the velocity v = noise - x0. Let
m = x - sigma v: this is the model's estimate of the clean sample x0. Each solver here is linear in x and in the
estimates m of recent steps, and its weights depend only on the noise levels. Therefore the host computes all weights
before the loop, in float64, and a step is one weighted sum. The loop never reads a number from the device.

Let s and s' be the noise levels of steps i and i+1, and lambda(s) = ln(1 - s) - ln s. The first-order step is the Euler
step: (s'/s) x + (1 - s'/s) m. The second-order step adds a term to the first-order step: a multiple of the slope of m,
where m is taken as a function of lambda.

The noise levels of a run come from a grid (`grid`) or from a list (`listed`). Lists are for weights that were distilled
to few steps. UniPC followed by Euler (`unipc-euler`) is for a model whose low-noise expert is distilled, and whose
high-noise expert is not. `rcm` mixes m with fresh noise: x' = (1 - s') m + s' noise.
This module does not import torch: a sample may be an array of any library.
Sources: DPM-Solver++ (arXiv 2211.01095) eq. 12; UniPC (arXiv 2302.04867) algorithms 5 and 7 with B(h) = e^h - 1. The
noise levels and the solver orders are those of Wan-Video/Wan2.2 (wan/utils/fm_solvers*.py), because the model was tuned
with these. rCM: arXiv 2510.08431.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanfast.runtime.facts.choices import Expert, Solver

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Holds the four weights by which UniPC's corrector (UniC) computes x~_i, the corrected sample of step i.

    x~_i = sample_prev * x~_{i-1} + clean_prev * m_{i-1} + clean_prev2 * m_{i-2} + clean * m_i,
    where m_i is the model's estimate of the clean sample at step i.
    """

    sample_prev: float
    clean_prev: float
    clean_prev2: float
    clean: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """Holds the weights of one step: x_{i+1} = sample * x~_i + clean * m_i + clean_prev * m_{i-1} + noise * e_i.

    x~_i is the sample x_i after `correction`. If `correction` is None, x~_i is x_i. m_i is the model's estimate of the
    clean sample at step i. e_i is standard normal noise, drawn for this step.
    """

    sigma: float
    timestep: int
    sample: float
    clean: float
    clean_prev: float = 0.0
    noise: float = 0.0
    correction: Correction | None = None


@dataclass(frozen=True)
class Levels:
    """Holds the noise level and the timestep of each step of a run.

    `sigmas` has one element more than `timesteps`: the last element is 0, the noise level after the last step. The
    initial noise, which has variance 1, is multiplied by `start` before the first step.
    """

    sigmas: tuple[float, ...]  # float32 values
    timesteps: tuple[int, ...]
    start: float = 1.0

    def experts(self, boundary: float, switch_step: int | None = None) -> list[Expert]:
        """Returns the expert of each step.

        If `switch_step` is given, the high-noise expert runs this number of steps, and the low-noise expert the rest.
        If not, the high-noise expert runs the steps whose timestep is at least 1000 * `boundary` (0 to 1).
        """
        if switch_step is None:
            edge = boundary * NUM_TRAIN_TIMESTEPS
            return ["high_noise" if timestep >= edge else "low_noise" for timestep in self.timesteps]
        return ["high_noise" if index < switch_step else "low_noise" for index in range(len(self.timesteps))]


def grid(solver: Solver, num_steps: int, shift: float) -> Levels:
    """Returns the levels of `num_steps` steps; `shift` changes each level s to shift * s / (1 + (shift - 1) * s).

    For the solver `rcm`, `start` of the result is the first level, because the model expects initial noise of this
    scale. For the other solvers, `start` is 1.
    """
    # DPM++'s grid starts at pure noise. The others start one training step below it, at the float32 value of 0.999.
    start = 1.0 if solver == "dpm++" else float(np.float32(0.999))
    levels = np.linspace(start, 0.0, num_steps + 1)[:-1]
    return _levels(shift * levels / (1 + (shift - 1) * levels), is_scaled=solver == "rcm")


def listed(solver: Solver, sigmas: Sequence[float]) -> Levels:
    """Returns the levels of a run that has one step for each noise level in `sigmas`.

    A step ends at the level of the next step, and the last step ends at level 0. No shift is applied.
    For the solvers `euler` and `rcm`, `start` of the result is the first level, because the model expects initial noise
    of this scale. For the other solvers, `start` is 1.
    """
    return _levels(np.array(sigmas, dtype=np.float64), is_scaled=solver in ("euler", "rcm"))


def _levels(sigmas: np.ndarray, *, is_scaled: bool) -> Levels:
    """Returns levels as float32 values; timesteps are cut off to integers."""
    timesteps = tuple(int(t) for t in sigmas * NUM_TRAIN_TIMESTEPS)
    rounded = tuple(float(s) for s in sigmas.astype(np.float32))
    return Levels((*rounded, 0.0), timesteps, rounded[0] if is_scaled else 1.0)


def solve(solver: Solver, levels: Levels, num_high: int) -> tuple[Step, ...]:
    """Returns the steps of `solver` at the noise `levels`.

    `num_high`: the number of steps of the high-noise expert, which runs first; only `unipc-euler` needs this number.
    With `unipc-euler`, UniPC makes the steps of the high-noise expert, and Euler the steps of the low-noise expert.
    The first and the last step of UniPC and DPM++ are of first order.
    """
    sigmas, num_steps = levels.sigmas, len(levels.timesteps)
    num_unipc = {"unipc": num_steps, "unipc-euler": num_high}.get(solver, 0)
    num_second_order = num_steps if solver == "dpm++" else num_unipc

    def weights(i: int) -> dict[str, float]:
        if solver == "rcm":
            return {"sample": 0.0, "clean": 1 - sigmas[i + 1], "noise": sigmas[i + 1]}
        return _prediction(sigmas, i, second_order=0 < i < num_second_order - 1)

    return tuple(
        Step(
            sigma=sigmas[i],
            timestep=levels.timesteps[i],
            **weights(i),
            correction=_correction(sigmas, i) if 0 < i < num_unipc else None,
        )
        for i in range(num_steps)
    )


class Integrator:
    """Integrates one video's sample step by step, from noise to the clean sample.

    The integrator holds the model's last estimates of the clean sample. `fresh_noise` draws the noise of a step; only
    the solver `rcm` needs this noise.
    """

    def __init__(self, steps: tuple[Step, ...], fresh_noise: Callable[[], Any] | None = None) -> None:
        self._steps, self._fresh_noise = iter(steps), fresh_noise
        self._sample_prev: Any = None  # x~_{i-1}
        self._clean_prev: Any = None  # m_{i-1}
        self._clean_prev2: Any = None  # m_{i-2}

    def advance(self, sample: Any, velocity: Any) -> Any:
        """Returns the sample at the next noise level, from the sample and the velocity at the current noise level.

        Both samples and the velocity are float32.
        """
        step = next(self._steps)
        clean = sample - step.sigma * velocity
        if (c := step.correction) is not None:
            sample = c.sample_prev * self._sample_prev + c.clean_prev * self._clean_prev + c.clean * clean
            if c.clean_prev2:
                sample = sample + c.clean_prev2 * self._clean_prev2
        predicted = step.sample * sample + step.clean * clean
        if step.clean_prev:
            predicted = predicted + step.clean_prev * self._clean_prev
        if step.noise:
            assert self._fresh_noise is not None
            predicted = predicted + step.noise * self._fresh_noise()
        self._sample_prev, self._clean_prev, self._clean_prev2 = sample, clean, self._clean_prev
        return predicted


def _log_snr(sigma: float) -> float:
    """Returns lambda, half the log signal-to-noise ratio, which is infinite at either end."""
    if sigma >= 1.0:
        return -math.inf
    return math.inf if sigma <= 0.0 else math.log1p(-sigma) - math.log(sigma)


def _prediction(sigmas: Sequence[float], i: int, *, second_order: bool) -> dict[str, float]:
    ratio = sigmas[i + 1] / sigmas[i]
    if not second_order:
        return {"sample": ratio, "clean": 1 - ratio}
    before, here, after = (_log_snr(s) for s in sigmas[i - 1 : i + 2])
    slope = (1 - ratio) * 0.5 * (after - here) / (here - before)
    return {"sample": ratio, "clean": 1 - ratio + slope, "clean_prev": -slope}


def _correction(sigmas: Sequence[float], i: int) -> Correction:
    """Returns UniC's correction after the step from i-1 to i, of the order of that step's prediction."""
    ratio = sigmas[i] / sigmas[i - 1]
    if i == 1:
        return Correction(sample_prev=ratio, clean_prev=0.5 * (1 - ratio), clean_prev2=0.0, clean=0.5 * (1 - ratio))
    before, previous, here = (_log_snr(s) for s in sigmas[i - 2 : i + 1])
    h = here - previous
    r = (before - previous) / h
    b = math.expm1(-h)
    g1 = b / -h - 1
    b1, b2 = g1 / b, 2 * (g1 / -h - 0.5) / b
    rho1 = (b1 - b2) / (1 - r)
    rho2 = b1 - rho1
    return Correction(
        sample_prev=ratio,
        clean_prev=(1 - ratio) * (1 - rho1 / r - rho2),
        clean_prev2=(1 - ratio) * rho1 / r,
        clean=(1 - ratio) * rho2,
    )
