"""This module computes self-attention in float8 in the scheduled steps and layers of a video; see `attention_fp8`.

In all other steps and layers, self-attention is exact. Cross-attention is always exact. With --attention-check, the
error is measured: the attention of a few queries is also computed exactly.

Shapes: B batch (1), L tokens of this rank, H heads of all ranks, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.facts.choices import Branch, Expert
from wanfast.runtime.facts.fp8_schedule import Fp8Schedule
from wanfast.runtime.models import lossy
from wanfast.runtime.models.attention_check import sampled_errors
from wanfast.runtime.models.bricks import TokenOrder
from wanfast.runtime.models.dit import SelfAttention, WanDiT
from wanfast.runtime.models.projections import Fp8
from wanfast.runtime.planning.plan import Plan


class Fp8Attention(LossyAttention):
    """This class sets in which steps and layers both experts compute self-attention in float8."""

    def __init__(self, num_heads: int, ranks: Ranks) -> None:
        """Stores the arguments; `num_heads` counts the heads of all ranks."""
        super().__init__(num_heads, ranks)
        self.centres_v = True  # false only to measure what the subtraction of v's mean is worth
        self._schedule: Fp8Schedule | None = None
        self._num_tokens = 0  # of all ranks
        self._checked = torch.zeros(num_heads, device=ranks.device)  # the errors of the layer that ran
        self._layers: list[list[SelfAttention]] = []  # of each expert

    def use_in(self, model: WanDiT) -> None:
        """Adds an expert; before each forward, this object tells the expert's layers how to compute self-attention."""
        self._layers.append(model.self_attentions())

    def start(self, plan: Plan) -> TokenOrder:
        order = super().start(plan)
        lossy.run(check=self.check)
        self._schedule, self._num_tokens = plan.fp8, plan.geometry.tokens
        self._tell(None)
        return order

    def begin(self, step: int, expert: Expert, branches: Sequence[Branch], branch: Branch, ranks: Ranks) -> None:
        super().begin(step, expert, branches, branch, ranks)
        self._tell(step)

    def finish(self) -> None:
        super().finish()
        self._tell(None)

    def _tell(self, step: int | None) -> None:
        """Sets how all layers compute self-attention in this step; None means exactly."""
        schedule = self._schedule
        assert schedule is not None, "no video was started"
        in_fp8 = Fp8(schedule.hadamard, self._checked if self.is_checked else None, self.centres_v)
        for layers in self._layers:
            for layer, attention in enumerate(layers):
                attention.fp8 = in_fp8 if step is not None and schedule.is_fp8(step, layer) else None

    def check(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, constant: Tensor) -> Tensor:
        """Returns the relative error [H] of each head of `out` + `constant`, measured on sampled queries of all ranks.

        This sum is the float8 attention that was computed from `q`, `k` and `v` in the current layer. `constant` is
        [H, D]. All others are [B, L, H, D], and hold the tokens of this rank. The method `errors` later returns the
        errors of all layers.
        """
        assert self._forward is not None
        sequence = self._forward.ranks.sequence
        first, count = sequence.own(self._num_tokens)
        rows = self._rows(self._layer, self._num_tokens).to(q.device, non_blocking=True)
        tensors = q[0], k[0, :count], v[0, :count], out[0]
        errors = sampled_errors(*tensors, rows, first, sequence.stack, constant)
        self._keep(self._layer, errors, range(self._num_heads))
        return errors
