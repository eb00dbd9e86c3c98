"""MagCache skips forwards: a stored residual then replaces the blocks. The plan is made before the generation.

A residual is the sum that the blocks of an expert add to their input. Over most of the schedule, residuals change
little from step to step: the norms of two successive residuals have a ratio near one. A curve holds these ratios, which
are measured once for a model and a schedule. The ratios predict the error of each skip. `plan_skips` skips forwards
while the accumulated error stays below a threshold. `plan_best` skips a given number of forwards with the least error.
A skipped forward reuses the residual of the last forward that ran, or extrapolates the last two residuals. The plan
depends only on the curve and the settings, so every rank computes the same plan.

Each branch of guidance has its own forwards, residuals and accumulated error. An expert uses only its own residuals.
Cost: one residual for each branch, or two if they are extrapolated: [L, d] in float32, with L tokens and d channels.
Limit: a curve is valid for one model, one solver, one number of steps and one shift. `resample` converts a curve to
other steps of the same solver.
Source: MagCache (arXiv 2506.09045), section 3.3. The rules that say which experts may skip come from MagCache's code
for Wan2.2.
This module does not import torch.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert, MagCacheRule

_MOST_CHANGE = 100.0  # of a residual's logarithm in one step; no measured curve comes near
Ratios = Sequence[tuple[float, float]]  # [step][branch]: the residual's norm over that of the step before
_EXTRAPOLATED_STEPS = 2  # after the last computed one
Term = tuple[int, float]  # (an earlier step, the weight of its residual)
Skips = tuple[bool, bool]  # of one step: (the prompt's branch, the negative prompt's)


@dataclass(frozen=True)
class MagCacheSettings:
    """Holds the limits within which forwards may be skipped, and the rule that says which experts may skip."""

    threshold: float  # of the accumulated error
    max_skips: int  # of one branch in a row
    retention: float  # share of an expert's forwards, from the first on, that always run
    rule: MagCacheRule = "low-noise-only"


def plan_skips(
    ratios: Ratios,
    experts: Sequence[Expert],
    settings: MagCacheSettings,
    *,
    joint: bool = False,
    guided: Sequence[bool] | None = None,
    always: Collection[int] = (),
) -> list[Skips]:
    """Returns for each step a pair of bools: (the prompt's branch skips, the negative prompt's branch skips).

    The plan is greedy: a branch skips as soon as the limits of `settings` allow it.
    `ratios`: the curve's ratios of each step. `experts`: the expert of each step.
    `joint`: if true, a step skips both branches or none. If different ranks compute the two branches, joint skips
    keep one rank from waiting for the other.
    `guided`: for each step, whether the step has the negative prompt's branch. None means that all steps have this
    branch.
    `always`: steps whose forwards are never skipped.
    """
    may_skip = _allowed(experts, settings.retention, settings.rule, always)
    computed = _SkipRow(settings)
    rows = [computed, computed]
    plan: list[Skips] = []
    for step, of_step in enumerate(ratios):  # an expert's first step is computed, so a row of skips ends there
        after = [row.after(ratio) for row, ratio in zip(rows, of_step, strict=True)]
        allowed = [may and row.is_within_limits for may, row in zip(may_skip[step], after, strict=True)]
        negative = guided is None or guided[step]
        prompt = allowed[0] and (allowed[1] or not (joint and negative))
        skips = (prompt, negative and (prompt if joint else allowed[1]))
        rows = [longer if skip else computed for longer, skip in zip(after, skips, strict=True)]
        plan.append(skips)
    return plan


def plan_best(
    ratios: Ratios,
    experts: Sequence[Expert],
    settings: MagCacheSettings,
    skipped: int,
    *,
    exactly: bool = True,
    joint: bool = False,
    guided: Sequence[bool] | None = None,
    always: Collection[int] = (),
) -> list[Skips]:
    """Returns the plan that skips `skipped` forwards with the least predicted error.

    The result and the other arguments are those of `plan_skips`, but the threshold in `settings` is ignored.
    A skipped forward at step j reuses the residual of an earlier step i. The forward's error is |1 - p|, where p is the
    product of the ratios of the steps i+1 to j. The plan's error is the sum of the errors of its skipped forwards.
    `exactly`: what happens if joint skips, which come in pairs, cannot give exactly `skipped` forwards. If true,
    ConfigError is raised; if false, the plan skips one forward less.
    Also raises ConfigError if the limits in `settings` allow fewer skips than `skipped`.
    """
    may_skip = _allowed(experts, settings.retention, settings.rule, always)
    guided = guided or [True] * len(ratios)
    steps = list(zip(ratios, guided, may_skip, strict=True))
    prompt: list[_Call] = [((of[0],), int(may[0])) for of, _, may in steps]
    negative: list[_Call] = [((of[1],), int(may[1] and both)) for of, both, may in steps]
    together: list[_Call] = [(of, (1 + both) * all(may[: 1 + both])) for of, both, may in steps]
    first = _Cheapest(together if joint else prompt, settings.max_skips)
    second = None if joint else _Cheapest(negative, settings.max_skips)
    others = {0: 0.0} if second is None else second.errors
    counts = {n + m for n in first.errors for m in others}
    most = max(counts)
    if skipped > most:
        limits = f"--magcache-rule {settings.rule}, --magcache-k {settings.max_skips}"
        raise ConfigError(
            f"at most {most} forwards can be skipped with {limits} and --retention-ratio {settings.retention:g}, not "
            f"{skipped}: use a smaller --magcache-skip or a larger --magcache-budget, or change --magcache-rule, "
            "--magcache-k or --retention-ratio"
        )
    if exactly and skipped not in counts:
        raise ConfigError(
            f"the plan cannot skip {skipped} forwards, because both branches skip together: use --magcache-skip "
            f"{skipped - 1}"
        )
    skipped = max(count for count in counts if count <= skipped)
    _, of_first = min((error + others[skipped - n], n) for n, error in first.errors.items() if skipped - n in others)
    ours = first.steps(of_first)
    theirs = {step for step in ours if guided[step]} if second is None else second.steps(skipped - of_first)
    return [(step in ours, step in theirs) for step in range(len(ratios))]


def accumulated_error(ratios: Ratios, plan: Sequence[Skips]) -> float:
    """Returns the predicted error of a plan: the sum of the errors of all skipped forwards.

    `plan_best` defines the error of a forward, and minimises this sum.
    """
    total = 0.0
    for branch in (0, 1):
        product = 1.0
        for of_step, skips in zip(ratios, plan, strict=True):
            product = product * of_step[branch] if skips[branch] else 1.0
            total += abs(1 - product)
    return total


_Call = tuple[tuple[float, ...], int]  # a step: its ratios, and the calls that a skip saves (0: no skip is allowed)


class _Cheapest:
    """Finds for every number of skipped calls the steps to skip with the least error, by dynamic programming.

    The cost of a skip depends only on the step and on the skips before it in the row. So the state after a step is
    (skips in the row, calls skipped), and an array holds the least error of each state that is possible by then.
    """

    def __init__(self, line: Sequence[_Call], max_skips: int) -> None:
        self._line = line
        most, longest = sum(calls for _, calls in line), min(max_skips, len(line))
        self._least = np.full((len(line) + 1, most + 1), np.inf)  # [step, calls skipped before the step]
        self._costs: list[list[float]] = []  # of each step: as the first skip of a row, as the second, ...
        before, after = np.empty((2, longest + 1, most + 1))
        self._least[0, 0] = before[0, 0] = 0.0
        products = np.ones((1, len(line[0][0])))  # of the ratios in a row of that many skips
        width = 1
        for step, (ratios, calls) in enumerate(line):
            grown = products[: longest if calls else 0] * ratios
            rows, costs = len(grown), np.abs(1 - grown)[:, :calls].sum(axis=1)
            after[: rows + 1, :calls] = after[: rows + 1, width : width + calls] = np.inf
            after[0, :width] = self._least[step, :width]
            np.add(before[:rows, :width], costs[:, np.newaxis], out=after[1 : rows + 1, calls : width + calls])
            before, after, width = after, before, width + calls
            before[: rows + 1, :width].min(axis=0, out=self._least[step + 1, :width])
            products = np.concatenate((np.ones_like(products[:1]), grown))
            self._costs.append(costs.tolist())
        self.errors = {n: float(error) for n, error in enumerate(self._least[-1]) if error < np.inf}

    def steps(self, skipped: int) -> set[int]:
        """Returns the steps to skip, so that `skipped` forwards are saved with the least error."""
        steps: set[int] = set()
        end = len(self._line)
        while end > 0:
            row = self._last_row(end, skipped)
            steps.update(row)
            skipped -= self._calls(row)
            end = row.start - 1  # the step before a row is computed
        return steps

    def _last_row(self, end: int, skipped: int) -> range:
        """Returns the row of skips that ends before the step `end`: the shortest one with the least error."""
        for start in range(end, -1, -1):
            row = range(start, end)
            error = self._least[max(start - 1, 0), skipped - self._calls(row)]
            for length, step in enumerate(row):
                error += self._costs[step][length]
            if error == self._least[end, skipped]:
                return row
        raise AssertionError("unreachable: one of the rows has the least error")

    def _calls(self, row: range) -> int:
        return sum(self._line[step][1] for step in row)


def _allowed(experts: Sequence[Expert], retention: float, rule: MagCacheRule, always: Collection[int]) -> list[Skips]:
    """Returns which forwards may be skipped, for each step.

    Not allowed are the first step of an expert, the retained forwards and the steps in `always`.
    """
    high = sum(expert == "high_noise" for expert in experts)
    return [
        (False, False)
        if step in (0, high, *always)
        else (
            not _is_retained(2 * step, 2 * high, 2 * len(experts), retention, rule),
            not _is_retained(2 * step + 1, 2 * high, 2 * len(experts), retention, rule),
        )
        for step in range(len(experts))
    ]


def _is_retained(call: int, high_calls: int, calls: int, retention: float, rule: MagCacheRule) -> bool:
    """Returns whether a forward, counted over both branches, is among the first ones, which always run."""
    low_calls = calls - high_calls
    if rule == "low-noise-only":
        return call < int(high_calls + low_calls * retention)
    return call < int(high_calls * retention) or high_calls <= call <= high_calls + low_calls * retention


@dataclass(frozen=True)
class _SkipRow:
    """Holds the number of skips that one branch makes in a row, and the accumulated error of these skips."""

    settings: MagCacheSettings
    product: float = 1.0  # of the ratios since the residual was computed
    error: float = 0.0
    skips: int = 0

    def after(self, ratio: float) -> _SkipRow:
        """Returns a row that has one skip more; `ratio` is the ratio of the step that is skipped."""
        product = self.product * ratio
        return _SkipRow(self.settings, product, self.error + abs(1 - product), self.skips + 1)

    @property
    def is_within_limits(self) -> bool:
        return self.error < self.settings.threshold and self.skips <= self.settings.max_skips


def resample(
    ratios: Ratios, of: Sequence[tuple[Expert, int]], to: Sequence[tuple[Expert, int]]
) -> list[tuple[float, float]]:
    """Returns ratios for the steps `to`, interpolated from a curve's ratios for the steps `of`.

    A step is (expert, timestep). Each branch of each expert is converted separately:
    1. The ratios are multiplied up to each step of `of`. The product is the norm of this step's residual, relative to
       the norm at the expert's first step.
    2. The logarithm of the norm is interpolated linearly over the timestep. Outside the timesteps of `of`, the
       logarithm is extrapolated linearly.
    3. The norm at each step of `to` is divided by the norm at the step before. The first ratio of an expert is 1.

    Raises ConfigError if `of` has fewer than two timesteps of an expert that occurs in `to`. Also raises ConfigError if
    the timesteps of `to` are so far from those of `of` that the norm would change by an impossible factor in one step.
    """
    if list(of) == list(to):
        return list(ratios)
    result: list[tuple[float, float]] = []
    for expert in dict.fromkeys(expert for expert, _ in to):
        known = [index for index, (running, _) in enumerate(of) if running == expert]
        timesteps = [timestep for running, timestep in to if running == expert]
        if (num_known := len({of[index][1] for index in known})) < 2:
            name = expert.replace("_", "-")
            raise ConfigError(
                f"the curve has too few steps of the {name} expert for an interpolation: {num_known}, but at least 2 "
                "are needed"
            )
        by_branch = [
            _resampled([ratios[index][branch] for index in known], [of[index][1] for index in known], timesteps)
            for branch in (0, 1)
        ]
        result += zip(*by_branch, strict=True)
    return result


def _resampled(ratios: Sequence[float], of: Sequence[int], to: Sequence[int]) -> list[float]:
    """Returns the ratios of one branch and one expert, whose first ratio is ignored; `of` and `to` decrease."""
    levels = dict(zip(of, itertools.accumulate(math.log(ratio) for ratio in [1.0, *ratios[1:]]), strict=True))
    points = sorted((-timestep, level) for timestep, level in levels.items())  # each timestep once
    at = [_on_line(points, -timestep) for timestep in to]
    changes = [here - before for before, here in itertools.pairwise(at)]
    if max(map(abs, changes), default=0.0) > _MOST_CHANGE:
        raise ConfigError(
            "the curve cannot be extrapolated to this run's timesteps, which are too far from the curve's timesteps"
        )
    return [1.0, *map(math.exp, changes)]


def _on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    right = min(max(bisect.bisect_left(points, (x,)), 1), len(points) - 1)
    (before, low), (after, high) = points[right - 1 : right + 1]
    return low + (x - before) / (after - before) * (high - low)


class StepCache(Protocol):
    """This interface decides for each forward of the denoising loop whether a stored residual replaces the blocks."""

    def reuse(self, step: int, branch: Branch) -> Any | None:
        """Returns the residual that replaces the blocks in this forward, or None if the blocks must run."""
        ...

    def wants(self, step: int, branch: Branch) -> bool:
        """Returns whether a later step needs the residual of this forward."""
        ...

    def keep(self, step: int, branch: Branch, residual: Any) -> None:
        """Stores the residual of a forward whose blocks ran, for later steps."""
        ...


class ResidualCache:
    """Follows one video's plan of skips, and frees each residual after the last step that uses this residual."""

    def __init__(self, plan: Sequence[Skips], levels: Sequence[tuple[Hashable, float]] | None = None) -> None:
        """`plan` holds the skips of each step, as `plan_skips` returns them; `levels` is that of `residual_terms`."""
        self._terms = {
            branch: residual_terms([of[index] for of in plan], levels) for index, branch in enumerate(BRANCHES)
        }
        self._last_use = {
            branch: {source: step for step, terms in of_step.items() for source, _ in terms}
            for branch, of_step in self._terms.items()
        }
        self._residuals: dict[Branch, dict[int, Any]] = {branch: {} for branch in BRANCHES}

    def reuse(self, step: int, branch: Branch) -> Any | None:
        terms, held = self._terms[branch].get(step), self._residuals[branch]
        if terms is None:
            return None
        (last, _), *before = terms
        residual = held[last]
        for source, weight in before:  # the weights add up to 1
            change = held[source] - residual
            change *= weight
            change += residual
            residual = change
        for source, _ in terms:
            if self._last_use[branch][source] == step:
                del held[source]
        return residual

    def wants(self, step: int, branch: Branch) -> bool:
        return step in self._last_use[branch]

    def keep(self, step: int, branch: Branch, residual: Any) -> None:
        self._residuals[branch][step] = residual


def residual_terms(
    skipped: Sequence[bool], levels: Sequence[tuple[Hashable, float]] | None = None
) -> dict[int, tuple[Term, ...]]:
    """Returns {skipped step: terms} of one branch; the terms say which residuals replace the residual of this step.

    A term is (an earlier step, the weight of that step's residual). The weighted sum of the terms replaces the missing
    residual. `skipped`: whether each step is skipped. `levels`: (kind, noise level) of each step; steps of one kind
    have the same expert and the same branches.
    Usually, the residual of the last computed step is reused, with weight 1. Instead, the residual is extrapolated
    linearly over the noise level, from the last two computed steps, if three conditions hold: `levels` is given, the
    skipped step and the two computed steps are of one kind, and the skipped step is at most two steps after the last
    computed step.
    """
    terms: dict[int, tuple[Term, ...]] = {}
    before, last = None, 0
    for step, is_skipped in enumerate(skipped):
        if not is_skipped:
            before, last = last if step else None, step
        elif (
            levels is None
            or before is None
            or levels[before][0] != levels[step][0]
            or step - last > _EXTRAPOLATED_STEPS
        ):
            terms[step] = ((last, 1.0),)
        else:
            (_, level_before), (_, level_last), (_, level) = levels[before], levels[last], levels[step]
            ahead = (level - level_last) / (level_last - level_before)
            terms[step] = ((last, 1 + ahead), (before, -ahead))
    return terms
