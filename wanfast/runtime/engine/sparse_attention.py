"""This module computes the self-attention of a video with block lists, and decides when block lists are made.

The tokens are divided into blocks. A block list names the blocks of keys to which one block of queries attends. The
first steps and the first layers stay dense. For all other calls, the module `attention_router` makes block lists, for
each layer and each branch of guidance. The next few steps use the same block lists, because attention changes little
from step to step. Cross-attention is always dense.
The plan of densities says how long the block lists of each head are, in each band. Instead of a density, a head may
have float8: then the head attends to all blocks, in float8. Under Ulysses, each rank makes the block lists of its own
heads. The heads are divided among the ranks so that all ranks have nearly equal work, because the slowest rank makes
the others wait.
In a calibration, all calls are dense. The method `SparseAttention.measure` starts the calibration, and takes the
lengths of block lists whose errors are measured.

Shapes: B batch (1), L tokens, h heads of this rank, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.lossy_attention import Forward, LossyAttention
from wanfast.runtime.facts.choices import Branch, Expert
from wanfast.runtime.facts.sparsity import BLOCK, BRICK, Sparsity
from wanfast.runtime.models import lossy
from wanfast.runtime.models.attention import HeadOrder
from wanfast.runtime.models.attention_check import errors_by_length, fp8_errors, sampled_errors
from wanfast.runtime.models.attention_fp8 import attention_in_fp8
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.attention_router import block_lists, block_order
from wanfast.runtime.models.block_sparse import BlockLists, listed_attention
from wanfast.runtime.models.bricks import TokenOrder, brick_order
from wanfast.runtime.models.dit import SelfAttention, WanDiT
from wanfast.runtime.planning.plan import Plan

T = TypeVar("T")


class SparseAttention(LossyAttention):
    """This class computes one rank's part of the self-attention, and holds the block lists of the current video."""

    def __init__(self, dense: AttentionFn, num_heads: int, ranks: Ranks) -> None:
        """Stores the arguments; `dense` computes the calls that are not sparse, `num_heads` counts all ranks' heads."""
        super().__init__(num_heads, ranks)
        self._dense = dense
        self._sparsity: Sparsity | None = None
        self._lists: dict[tuple[Branch, int], tuple[Forward, Any]] = {}  # with the forward that made them
        self._ladder: Sequence[int] = ()
        self._measures_fp8 = False
        self._layers: dict[SelfAttention, int] = {}  # of both experts, with their numbers
        self._orders: dict[tuple[int, ...], HeadOrder] = {}
        self._is_compiled = False

    def measure(self, ladder: Sequence[int], *, fp8: bool) -> None:
        """Makes all later videos dense, and measures which errors sparse attention would have.

        `ladder`: the lengths of block lists to measure, in blocks. `fp8`: whether to measure float8 attention too. Each
        later video needs a plan with the option `attention_check`. After a video, the method `errors` returns several
        errors for each head: one for each length in `ladder`, then one for float8 if `fp8` is true.
        """
        self._ladder, self._measures_fp8 = ladder, fp8

    def use_in(self, model: WanDiT) -> None:
        """Makes each layer of an expert call `attend` for its self-attention; call `use_in` once for each expert."""
        for layer, attention in enumerate(model.self_attentions()):
            attention.attend = lossy.lossy_attention
            self._layers[attention] = layer

    def start(self, plan: Plan) -> TokenOrder:
        super().start(plan)
        lossy.run(attend=self.attend)
        self._sparsity, self._lists, self._orders = plan.sparsity, {}, {}
        self._is_compiled = plan.config.models.compile
        self._divide_heads(None)
        has_last = plan.config.video.last_image is not None
        return brick_order(plan.geometry.token_grid, BRICK, self._ranks.device, has_last=has_last)

    def begin(self, step: int, expert: Expert, branches: Sequence[Branch], branch: Branch, ranks: Ranks) -> None:
        """Tells this object which forward runs next, and frees the block lists that have become invalid.

        The arguments are those of `LossyAttention.begin`. A block list is valid in the step that made it and in the
        next steps, `Sparsity.lists_every` steps in all. It becomes invalid earlier if a step has another expert, other
        branches of guidance or another band.
        """
        assert self._sparsity is not None, "no video was started"
        super().begin(step, expert, branches, branch, ranks)
        every, band = self._sparsity.lists_every, self._sparsity.band
        # With other branches, the ranks of parallel guidance begin to compute the same branch, and need the same lists.
        # In another band, the lists may have other lengths.
        self._lists = {
            key: (made, lists)
            for key, (made, lists) in self._lists.items()
            if (made.expert, made.branches, band(made.step)) == (expert, branches, band(step))
            and step - made.step < every
        }
        self._divide_heads(self._forward)

    def finish(self) -> None:
        """Frees all block lists; call this method after the last step of a video."""
        super().finish()
        self._lists = {}

    def _divide_heads(self, forward: Forward | None) -> None:
        """Tells all layers in which order the ranks of this forward get the heads."""
        for attention, layer in self._layers.items():
            attention.head_order = self._order(forward, layer)

    def _order(self, forward: Forward | None, layer: int) -> HeadOrder | None:
        """Returns the order of a layer's heads among the ranks; None is the heads' own order.

        Compiled blocks always get an order, because one graph takes any order, but not None too.
        """
        assert self._sparsity is not None
        heads = in_order = tuple(range(self._num_heads))
        if forward is not None and (listed := self._sparsity.listed(forward.step, layer)) is not None:
            heads = tuple(itertools.chain(*self._sparsity.assigned(listed, forward.ranks.mesh.ulysses)))
        if heads == in_order and not self._is_compiled:
            return None
        if heads not in self._orders:
            self._orders[heads] = HeadOrder.of(heads, self._ranks.device)
        return self._orders[heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the attention [B, L, h, D] of this rank's h heads, in the layer that `enter` named last."""
        sparsity, forward, layer = self._sparsity, self._forward, self._layer
        assert sparsity is not None
        if forward is None or (listed := sparsity.listed(forward.step, layer)) is None:
            return self._dense(q, k, v)
        ulysses = forward.ranks.mesh.ulysses
        heads = sparsity.assigned(listed, ulysses)[forward.ranks.rank % ulysses]
        own_q = q[:, : k.shape[1]]  # the rows behind are Ulysses' padding
        kept = sparsity.first_blocks, sparsity.last_blocks
        rows = self._rows(layer, k.shape[1])[list(heads)].to(k.device, non_blocking=True) if self.is_checked else None
        if self._ladder:
            assert rows is not None, "errors are not checked"
            order = self._chosen(forward, layer, lambda: block_order(own_q, k, BLOCK, *kept))
            errors = errors_by_length(own_q[0], k[0], v[0], rows, order, BLOCK, self._ladder)
            in_fp8 = [fp8_errors(own_q[0], k[0], v[0], rows)[:, None]] if self._measures_fp8 else []
            self._keep(layer, torch.cat((errors, *in_fp8), dim=1), heads)
            return self._dense(q, k, v)
        lengths = [listed[head] for head in heads]
        ways = self._chosen(forward, layer, lambda: _ways(own_q, k, lengths, kept))
        out = _attended(own_q, k, v, ways)
        if rows is not None:
            self._keep(layer, sampled_errors(own_q[0], k[0], v[0], out[0], rows), heads)
        missing = q.shape[1] - k.shape[1]
        return F.pad(out, (0, 0, 0, 0, 0, missing)) if missing else out  # by 0, it would copy

    def _chosen(self, forward: Forward, layer: int, choose: Callable[[], T]) -> T:
        """Returns what was chosen for this branch and layer; chooses again if nothing may be used any more."""
        key = forward.branch, layer
        if key not in self._lists:
            self._lists[key] = forward, choose()
        chosen: T = self._lists[key][1]
        return chosen


class _Ways(NamedTuple):
    """Says how the heads of a rank are computed in one layer."""

    lists: BlockLists | None  # of the heads that have lists
    places: tuple[Tensor, Tensor] | None = None  # of the heads that have lists, and of those in float8, if both exist


def _ways(q: Tensor, k: Tensor, lengths: Sequence[int], kept: tuple[int, int]) -> _Ways:
    """Lists blocks for the heads that have lists; the others are in float8, and have the length 0.

    `kept` counts the first and the last blocks that all lists hold.
    """
    listed, in_fp8 = ([n for n, length in enumerate(lengths) if bool(length) == kind] for kind in (True, False))
    if not in_fp8:
        return _Ways(block_lists(q, k, BLOCK, lengths, *kept))
    if not listed:
        return _Ways(None)
    places = torch.tensor(listed, device=k.device), torch.tensor(in_fp8, device=k.device)
    q, k = (x.index_select(2, places[0]) for x in (q, k))
    return _Ways(block_lists(q, k, BLOCK, [lengths[head] for head in listed], *kept), places)


def _attended(q: Tensor, k: Tensor, v: Tensor, ways: _Ways) -> Tensor:
    if ways.lists is None:
        return attention_in_fp8(q, k, v)
    if ways.places is None:
        return listed_attention(q, k, v, ways.lists, BLOCK)
    by_lists: AttentionFn = partial(listed_attention, lists=ways.lists, block=BLOCK)
    out = torch.empty_like(q)
    for place, attend in zip(ways.places, (by_lists, attention_in_fp8), strict=True):
        own_q, own_k, own_v = (x.index_select(2, place) for x in (q, k, v))
        out.index_copy_(2, place, attend(own_q, own_k, own_v))
    return out
