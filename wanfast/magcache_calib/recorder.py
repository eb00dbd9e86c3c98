"""Defines a step cache that measures how residuals change from step to step, and that skips no forward.

For each step, branch and token, the ratio is |r| / |s|. r is the residual of this step, s is the residual of the step
before, and both norms are over the channels. For each step and branch this cache measures three values over all tokens.
They are the mean of the ratio, the standard deviation of the ratio ("spread"), and the mean cosine distance between r
and s. The first step has no measurement. The low-noise expert's first step is compared with the high-noise expert's
last step, as in the published curves. Source: MagCache (arXiv 2506.09045) section 3.2.

Shapes: L this rank's tokens, d model dim.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.finite import require_finite
from wanfast.runtime.facts.choices import BRANCHES, Branch


class Recorder:
    """Measures, on one rank, how the residuals of one video change from step to step.

    The measurements stay on the device until `measured` is called.
    """

    def __init__(self, ranks: Ranks, num_tokens: int) -> None:
        self._ranks = ranks
        _, self._num_own = ranks.sequence.own(num_tokens)  # a rank's padding is not measured
        self._branches = ranks.guidance.own(BRANCHES)  # steps without guidance run the prompt branch on every rank
        self._before: dict[Branch, Tensor] = {}
        self._sums: dict[tuple[int, Branch], Tensor] = {}

    def reuse(self, step: int, branch: Branch) -> None:
        return None

    def wants(self, step: int, branch: Branch) -> bool:
        return branch in self._branches

    def keep(self, step: int, branch: Branch, residual: Tensor) -> None:
        """Measures how the residual of a branch has changed since the step before; the first residual is only stored.

        `residual`: [1, L, d], L this rank's tokens, d model dim.
        """
        own = residual[0, : self._num_own]
        before, self._before[branch] = self._before.get(branch), own
        if before is None:
            return
        norm, norm_before = own.norm(dim=-1), before.norm(dim=-1)
        ratio = (norm / norm_before).double()
        distance = 1 - ((own * before).sum(-1) / (norm * norm_before)).double()
        self._sums[step, branch] = torch.stack((ratio.sum(), ratio.square().sum(), distance.sum()))

    def measured(self, num_steps: int) -> list[dict[Branch, dict[str, float] | None]]:
        """Returns for each step {branch: measurements}, computed over the tokens of all ranks.

        The measurements are {"ratio": the mean ratio, "spread": its standard deviation, "cosine_distance": the mean
        distance}, or None if the branch was not measured at this step.
        All ranks must call this method together, because it gathers the sums of all ranks. Raises NotFiniteError on all
        ranks if a number is not finite, for example because a residual is zero.
        """
        mine = {key: [*sums.tolist(), self._num_own] for key, sums in self._sums.items()}
        parts = self._ranks.gather(mine)
        for (step, branch), sums in sorted((key, sums) for part in parts for key, sums in part.items()):
            if not all(map(math.isfinite, sums)):
                where = f"the ratio of residuals at step {step + 1} of {num_steps}, branch {branch},"
                self._ranks.together(partial(require_finite, where, finite=False))
        return [
            {
                branch: _statistics([part[step, branch] for part in parts if (step, branch) in part])
                for branch in BRANCHES
            }
            for step in range(num_steps)
        ]


def _statistics(parts: list[list[float]]) -> dict[str, float] | None:
    ratio, square, distance, count = (math.fsum(values) for values in zip(*parts, strict=True)) if parts else (0,) * 4
    if not count:
        return None
    mean = ratio / count
    variance = max(0.0, square - count * mean * mean) / max(1, count - 1)
    found: dict[str, Any] = {"ratio": mean, "spread": math.sqrt(variance), "cosine_distance": distance / count}
    return found
