"""Computes the queries, keys and values of self-attention from this rank's tokens, in the order that a `Sequence` asks.

Shapes: B batch, L tokens, d model dim, H heads, D head dim, P ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from wanfast.runtime.models.attention_fp8 import (
    Scaling,
    largest_norms,
    sampled_rows,
    scale_of,
    scaling,
    statistics,
)
from wanfast.runtime.models.fused import heads_to_fp8
from wanfast.runtime.models.rope import RotaryTables
from wanfast.runtime.models.tokens import Tokens

if TYPE_CHECKING:
    from wanfast.runtime.models.attention import HeadOrder
    from wanfast.runtime.models.dit import RMSNorm, SelfAttention


class Fp8(NamedTuple):
    """Holds the settings of a layer that computes its self-attention in float8."""

    hadamard: bool  # whether q and k are multiplied by a Hadamard matrix
    errors: Tensor | None = None  # [H]: gets the error of each head, if it is checked
    centres_v: bool = True  # whether the mean of v is subtracted


class Projections:
    """This class computes the queries q, the keys k and the values v of this rank's tokens, in one call of a layer.

    `all` computes q, k and v together. `by_heads` computes either q or k, with the heads divided into groups. `values`
    computes v for one group of heads. A group has successive heads of the model, or of the `HeadOrder` if there is one.
    """

    def __init__(self, layer: SelfAttention, x_BLd: Tokens, rope: RotaryTables, order: HeadOrder | None) -> None:
        self._layer, self._x, self._rope, self._order = layer, x_BLd, rope, order

    def all(self) -> list[Tensor]:
        """Returns q, k and v, each [B, L, H, D]."""
        assert self._order is None, "one rank has all heads"
        layer, x = self._layer, self._x
        q, k, v = layer.qkv(x).chunk(3, -1) if layer.qkv else (layer.q(x), layer.k(x), layer.v(x))
        return [self._rotated("q", q, 1)[0], self._rotated("k", k, 1)[0], layer.heads(v, layer.num_heads)]

    def by_heads(self, name: str, parts: int) -> Tensor:
        """Returns q if `name` is "q", or k if `name` is "k", with the heads divided into `parts` equal groups.

        The result [parts, B, L, H / parts, D] is contiguous.
        """
        product = _product(self._layer, name, self._x)
        if self._order is None:
            return self._rotated(name, product, parts)
        return self._order.grouped(self._rotated(name, product, 1)[0], parts)

    def values(self, part: int, parts: int) -> Tensor:
        """Divides the heads into `parts` equal groups, and returns v for the heads of group `part`, counted from 0.

        The result [B, L, H / parts, D] is contiguous.
        """
        layer, x, H = cast("Any", self._layer), self._x, self._layer.num_heads
        if self._order is None:
            product = layer.qkv.part(x, 2 * parts + part, 3 * parts) if layer.qkv else layer.v.part(x, part, parts)
        else:
            heads = self._order.part(part, parts)
            product = layer.qkv.chosen(x, 2 * H + heads, 3 * H) if layer.qkv else layer.v.chosen(x, heads, H)
        return self._layer.heads(product, H // parts)

    def _rotated(self, name: str, product_BLd: Tensor, parts: int) -> Tensor:
        norm = getattr(self._layer, f"norm_{name}")
        return norm(product_BLd, self._layer.num_heads, self._rope, parts=parts)  # type: ignore[no-any-return]


class Fp8Projections:
    """This class computes q, k and v of this rank's tokens in float8, in one call of a layer; see `attention_fp8`.

    For the queries, call `queries`. For the keys and values, first call `statistics` on every rank. Then give the
    statistics of all ranks to `scaling`, and give the result of `scaling` to `keys_and_values`.
    """

    def __init__(self, layer: SelfAttention, x_BLd: Tokens, rope: RotaryTables, fp8: Fp8, *, together: bool) -> None:
        """Stores the arguments; `together`: whether fused q, k and v are computed in one product."""
        self._layer, self._x, self._rope, self._fp8 = layer, x_BLd, rope, fp8
        fused = layer.qkv(x_BLd).chunk(3, -1) if together and layer.qkv else ()
        self._products: dict[str, Tensor] = dict(zip("qkv", fused, strict=False))
        self.dtype: torch.dtype = layer.o.bias.dtype  # of the attention's result
        self._norms = largest_norms((layer.norm_q.weight, layer.norm_k.weight), layer.num_heads)

    def queries(self, parts: int) -> Tensor:
        """Returns q in float8, with the heads divided into `parts` equal groups: [parts, B, L, H / parts, D]."""
        return self._rounded("q", scale_of(self._norms[0]), None, parts)

    def statistics(self, first: int, count: int, num_tokens: int) -> Tensor:
        """Returns the statistics [5, d] of this rank's k and v, as `attention_fp8.statistics` defines them; d = H * D.

        `first`: the index of this rank's first token in the video. `count`: the number of this rank's tokens, without
        padding. `num_tokens`: the number of tokens of the video.
        """
        rows = sampled_rows(first, count, num_tokens)
        rope = RotaryTables(*(table[rows].contiguous() for table in self._rope))
        keys = self._layer.norm_k(self._product("k")[:, rows], self._layer.num_heads, rope)[0, 0]
        return statistics(keys, self._product("v")[0, rows])

    def scaling(self, statistics_P5d: Tensor) -> Scaling:
        """Returns each head's scales and centres: the numbers by which float8 values are made of q, k and v.

        `statistics_P5d`: the result of `statistics` on each of the P ranks.
        """
        return scaling(statistics_P5d, self._norms, centres_v=self._fp8.centres_v)

    def keys_and_values(self, scaling: Scaling, parts: int) -> tuple[Tensor, Tensor]:
        """Returns k and v in float8, with the heads divided into `parts` equal groups.

        Both are [parts, B, L, H / parts, D]. `scaling` is the result of the method `scaling`.
        """
        k, v = (self._rounded(*one, parts) for one in zip("kv", scaling.scales[1:], scaling[1:], strict=True))
        return k, v

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k and v of this rank's tokens before the rounding to float8, each [B, L, H, D]."""
        layer, heads = self._layer, self._layer.num_heads
        q, k = (norm(self._product(name), heads, self._rope)[0] for name, norm in self._normed().items())
        return q, k, layer.heads(self._product("v"), heads)

    def _normed(self) -> dict[str, RMSNorm]:
        return {"q": self._layer.norm_q, "k": self._layer.norm_k}

    def _product(self, name: str) -> Tensor:
        if name not in self._products:
            self._products[name] = _product(self._layer, name, self._x)
        return self._products[name]

    def _rounded(self, name: str, scale_H: Tensor, centre_HD: Tensor | None, parts: int) -> Tensor:
        """Returns one of q, k and v in float8, and frees its product if nothing else needs it."""
        x, norm = self._product(name), self._normed().get(name)
        if self._fp8.errors is None:
            del self._products[name]
        steps: dict[str, Any] = {}
        if norm:
            steps = {"norm": (norm.weight, norm.eps), "rope": self._rope, "hadamard": self._fp8.hadamard}
        return heads_to_fp8(x, scale_H, centre_HD, parts=parts, **steps)


def _product(layer: Any, name: str, x: Tokens) -> Tensor:  # the layer's linears are of whatever class
    """Returns one of q, k and v before its norm, [B, L, d]."""
    return layer.qkv.part(x, "qkv".index(name), 3) if layer.qkv else getattr(layer, name)(x)  # type: ignore[no-any-return]
