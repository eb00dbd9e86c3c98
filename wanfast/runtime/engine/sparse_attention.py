"""This module decides which calls of self-attention are sparse in a video, and which lists of blocks they use.

The first steps and the first layers stay dense. In all other calls, the router lists blocks for each branch of guidance
and layer. The lists are used for a few steps, because attention changes little from step to step. Cross-attention is
always dense.
Under Ulysses, each rank lists the blocks of its own heads. All lists have the same length, so that no rank waits.
With --attention-check, each sparse call is checked on 64 queries of each head (`attention_check`).

Shapes: B batch (1), L tokens, H heads of all ranks, h heads of this rank, D head dim, S sampled queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert
from wanfast.runtime.facts.sparsity import BLOCK, BRICK, Sparsity
from wanfast.runtime.models.attention_check import sampled_errors
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.attention_router import block_lists
from wanfast.runtime.models.block_sparse import BlockLists, block_sparse_attention
from wanfast.runtime.models.bricks import TokenOrder, brick_order
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning.plan import Plan

CHECKED_QUERIES = 64  # of each head, in each sparse call


class _Forward(NamedTuple):
    step: int
    expert: Expert
    branches: Sequence[Branch]  # of the step
    branch: Branch
    ranks: Ranks  # as they are grouped in this step


class SparseAttention:
    """This class holds the lists of the running video, and computes the self-attention of all layers of a rank."""

    def __init__(self, dense: AttentionFn, num_heads: int, ranks: Ranks) -> None:
        """Stores the arguments; `dense` computes the calls that are not sparse, `num_heads` counts all ranks' heads."""
        self._dense, self._num_heads, self._ranks = dense, num_heads, ranks
        self._sparsity: Sparsity | None = None
        self._forward: _Forward | None = None  # None before the first step, where a block may be rehearsed
        self._lists: dict[tuple[Branch, int], tuple[_Forward, BlockLists]] = {}
        self._errors: dict[tuple[int, Branch, int], tuple[int, Tensor]] = {}  # with the number of the first head
        self._seed: int | None = None  # of the queries that are checked

    def use_in(self, model: WanDiT) -> None:
        """Makes each layer of an expert call this object for its self-attention."""
        for layer, attention in enumerate(model.self_attentions()):
            attention.attend = partial(self._attend, layer)

    def start(self, plan: Plan) -> TokenOrder:
        """Begins a video, and returns the order of its tokens."""
        self._sparsity, self._forward, self._lists, self._errors = plan.sparsity, None, {}, {}
        self._seed = plan.config.video.seed if plan.config.models.attention_check else None
        return brick_order(plan.geometry.token_grid, BRICK, self._ranks.device)

    def begin(self, step: int, expert: Expert, branches: Sequence[Branch], branch: Branch, ranks: Ranks) -> None:
        """Begins the forward of one `branch` in a step, and frees the lists that this forward must not use.

        Lists are used for a few steps, by one expert, and only while the steps have the same branches. When the
        branches of a step change, the ranks of parallel guidance begin to compute the same branch. They must then use
        the same lists, so new lists are made.
        """
        assert self._sparsity is not None, "no video was started"
        self._forward, every = _Forward(step, expert, branches, branch, ranks), self._sparsity.lists_every
        self._lists = {
            key: (made, lists)
            for key, (made, lists) in self._lists.items()
            if (made.expert, made.branches) == (expert, branches) and step - made.step < every
        }

    def finish(self) -> None:
        """Frees the lists after the last step."""
        self._forward, self._lists = None, {}

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sparsity, forward = self._sparsity, self._forward
        assert sparsity is not None
        if forward is None or sparsity.is_dense(forward.step, layer):
            return self._dense(q, k, v)
        own_q = q[:, : k.shape[1]]  # the rows behind are Ulysses' padding
        key = forward.branch, layer
        if key not in self._lists:
            lists = block_lists(own_q, k, BLOCK, sparsity.listed, sparsity.first_blocks)
            self._lists[key] = forward, lists
        out = block_sparse_attention(own_q, k, v, self._lists[key][1], BLOCK)
        if self._seed is not None:
            first = forward.ranks.rank % forward.ranks.mesh.ulysses * k.shape[2]
            rows = self._rows(forward, layer, k.shape[1])[first : first + k.shape[2]].to(k.device)
            errors = sampled_errors(own_q[0], k[0], v[0], out[0], rows)
            self._errors[forward.step, forward.branch, layer] = first, errors
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - k.shape[1]))

    def _rows(self, forward: _Forward, layer: int, num_tokens: int) -> Tensor:
        """Draws the queries [H, S] to check in this call; a head's are the same on any number of ranks."""
        assert self._seed is not None
        seeds = (self._seed, forward.step, BRANCHES.index(forward.branch), layer)
        drawn = np.random.default_rng(seeds).integers(num_tokens, size=(self._num_heads, CHECKED_QUERIES))
        return torch.from_numpy(drawn)

    def report(self) -> dict[str, Any] | None:
        """Returns the errors of all ranks' heads as JSON, or None without --attention-check. All ranks call this.

        Steps, layers and heads count from 0. Layers that are dense have no errors.
        """
        if self._seed is None:
            return None
        assert self._sparsity is not None
        by_rank = self._ranks.gather({key: (first, errors.tolist()) for key, (first, errors) in self._errors.items()})
        heads: dict[tuple[int, Branch, int], dict[int, list[float]]] = {}
        for of_rank in by_rank:
            for key, (first, of_heads) in of_rank.items():
                heads.setdefault(key, {})[first] = of_heads
        found = {key: [each for _, own in sorted(parts.items()) for each in own] for key, parts in heads.items()}
        return _report(found, self._sparsity.num_layers)


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
