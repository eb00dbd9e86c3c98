"""This module holds the base class of lossy self-attention, which is faster than exact attention but not exact.

The methods `begin` and `enter` tell an object which forward and which layer run. The object collects the errors of the
lossy calls. Errors are measured only with --attention-check, on 64 random queries of each head. The queries of a call
depend on the video's seed, the step, the branch and the layer.

Shapes: H heads of all ranks, S sampled queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert
from wanfast.runtime.models import lossy
from wanfast.runtime.models.bricks import RASTER, TokenOrder
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning.plan import Plan

CHECKED_QUERIES = 64  # of each head, in each lossy call


class Forward(NamedTuple):
    """Says which forward runs: its step, expert and branch of guidance, and how this step groups the ranks."""

    step: int
    expert: Expert
    branches: Sequence[Branch]  # of the step
    branch: Branch
    ranks: Ranks


class LossyAttention:
    """This base class follows the forwards of a video, and collects the numerical errors of all lossy calls."""

    def __init__(self, num_heads: int, ranks: Ranks) -> None:
        """Stores the arguments; `num_heads` counts the heads of all ranks."""
        self._num_heads, self._ranks = num_heads, ranks
        self._forward: Forward | None = None  # None before the first step, where a block may be rehearsed
        self._errors: dict[tuple[int, Branch, int], tuple[Sequence[int], Tensor]] = {}  # with the heads' numbers
        self._num_layers = 0
        self._layer = 0  # that runs
        self._seed: int | None = None  # of the queries that are checked

    def use_in(self, model: WanDiT) -> None:
        """Lets this object decide how the layers of an expert compute self-attention; call it once for each expert."""
        raise NotImplementedError

    def start(self, plan: Plan) -> TokenOrder:
        """Begins a video, and returns the order of its tokens; a subclass also tells `lossy.run` what it computes."""
        self._forward, self._errors, self._num_layers = None, {}, plan.spec.dit.num_layers
        self._seed = plan.config.video.seed if plan.config.models.attention_check else None
        return RASTER

    def begin(self, step: int, expert: Expert, branches: Sequence[Branch], branch: Branch, ranks: Ranks) -> None:
        """Tells this object which forward runs next.

        `branches`: all branches of guidance that the step computes. `branch`: the one that this forward computes.
        `ranks`: the rank group, with the mesh of this step.
        """
        self._forward = Forward(step, expert, branches, branch, ranks)

    def enter(self, layer: int) -> None:
        """Begins layer `layer`, counted from 0, of the current forward."""
        self._layer = layer

    def finish(self) -> None:
        """Tells this object that the last step of the video has ended; the errors stay until the next video starts."""
        self._forward = None
        lossy.run()

    @property
    def is_checked(self) -> bool:
        return self._seed is not None

    def _rows(self, layer: int, num_tokens: int) -> Tensor:
        """Draws the queries [H, S] to check in this call; a head's are the same on any number of ranks."""
        assert self._forward is not None and self._seed is not None
        seeds = (self._seed, self._forward.step, BRANCHES.index(self._forward.branch), layer)
        drawn = np.random.default_rng(seeds).integers(num_tokens, size=(self._num_heads, CHECKED_QUERIES))
        return torch.from_numpy(drawn)

    def _keep(self, layer: int, errors: Tensor, heads: Sequence[int]) -> None:
        """Stores the errors [h, ...] of this call, which are those of the `heads`."""
        assert self._forward is not None
        self._errors[self._forward.step, self._forward.branch, layer] = heads, errors

    def report(self) -> dict[str, Any] | None:
        """Returns the errors of all ranks' heads as JSON, or None if no errors are measured.

        All ranks must call this method. Steps, layers and heads count from 0. Layers that are exact have no errors.
        """
        return _report(self.errors(), self._num_layers) if self.is_checked else None

    def errors(self) -> dict[tuple[int, Branch, int], list[Any]]:
        """Returns {(step, branch, layer): the relative errors of all heads, in the model's order}.

        The heads of all ranks are included. A head usually has one error. After a call of
        `SparseAttention.measure`, a head has a list of errors: one for each item of `ladder`, then one for float8 if
        `fp8` was true. All ranks must call this method.
        """
        by_rank = self._ranks.gather({key: (heads, errors.tolist()) for key, (heads, errors) in self._errors.items()})
        found: dict[tuple[int, Branch, int], dict[int, Any]] = {}
        for of_rank in by_rank:
            for key, (heads, errors) in of_rank.items():
                found.setdefault(key, {}).update(zip(heads, errors, strict=True))
        return {key: [error for _, error in sorted(of_heads.items())] for key, of_heads in found.items()}


def _report(found: dict[tuple[int, Branch, int], list[float]], num_layers: int) -> dict[str, Any]:
    """Returns figures of the errors {(step, branch, layer): error of each head}, and all errors by forward."""
    forwards = sorted({(step, BRANCHES.index(branch)) for step, branch, _ in found})
    values = {(*key, head): error for key, errors in found.items() for head, error in enumerate(errors)}
    worst = max(values, key=values.__getitem__, default=None)
    errors = np.array(list(values.values()))
    return {
        "queries_a_head": CHECKED_QUERIES,
        "mean": _rounded(errors.mean()) if worst else None,
        "of_95_percent": _rounded(np.quantile(errors, 0.95)) if worst else None,
        "largest": None if worst is None else _rounded(values[worst]),
        "largest_at": None if worst is None else dict(zip(("step", "branch", "layer", "head"), worst, strict=True)),
        "forwards": [
            {
                "step": step,
                "branch": BRANCHES[branch],
                "relative_errors": [
                    [*map(_rounded, found[key])] if (key := (step, BRANCHES[branch], layer)) in found else None
                    for layer in range(num_layers)
                ],
            }
            for step, branch in forwards
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
