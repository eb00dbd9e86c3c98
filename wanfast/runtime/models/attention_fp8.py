"""This module computes attention with queries, keys and values in float8 (e4m3), by FlashAttention-3 or its emulation.

Three steps prepare q, k and v for the rounding. In exact arithmetic, none of these steps changes the result.
* A constant vector of each head is subtracted from all keys: softmax does not change.
* A constant vector of each head is subtracted from all values. The output is then too small by the same vector, because
  the rows of softmax sum to 1. The next linear layer adds the vector through its bias (`Linear.of_shifted`).
* Queries and keys are multiplied by the same Hadamard matrix, which spreads large values of a few channels over
  all channels.
The constants are means over tokens: over at least 2048 of them, or over all tokens of a short video. A constant must be
the same for all tokens of a head, so the ranks of Ulysses add up their sums before they quantize.

Each head has one scale for q, one for k and one for v. RMS norm bounds each vector of q and k, so that the scales of q
and k follow from the weights of the norm. The bound may be larger than all numbers that occur. This costs no precision,
because float8 keeps its relative precision down to 1/28,672 of its largest number. For the same reason, the scale of v
allows for values that lie 64 times as far from the constant as any value of the sampled tokens. Beyond, a value
becomes this limit.

Shapes: B batch, L tokens, S sampled tokens, H heads, D head dim, d = H D. Sources: FlashAttention-3 (arXiv 2407.08608)
section 3.3 for float8 and the Hadamard matrix; DeepSeek-V3 (arXiv 2412.19437) section 3.3.2 for sums on tensor cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from wanfast.runtime.facts.fp8_schedule import can_rotate
from wanfast.runtime.models.attention_kernels import is_importable
from wanfast.runtime.models.fused import heads_to_fp8
from wanfast.runtime.models.operators import opaque
from wanfast.runtime.models.tokens import FP8, LARGEST

_SAMPLED = 2048  # tokens that a mean needs at least, if there are as many
_MARGIN = 64.0  # by which any v may exceed the largest sampled one
_LARGEST_P = 256.0  # FlashAttention-3 multiplies P by this, so that P uses the range of float8
_STEP, _BITS = 32, 12  # a tensor core adds the products of 32 keys to a sum, and keeps about 12 bits of it
_QUERIES = 512  # that the emulation holds the scores of
_TINIEST = 1e-12  # so that a head of zeros has a scale


class Fp8Heads(NamedTuple):
    """Holds the queries, keys and values of some heads in float8.

    Before the rounding, a constant vector of each head was subtracted from k and from v, and then q, k and v were
    divided by the scales. `fp8_attention` multiplies by the scales again.
    """

    q: Tensor  # [B, L, H, D]
    k: Tensor
    v: Tensor
    scales: Tensor  # [3, H]: of q, k and v


class Scaling(NamedTuple):
    """Holds each head's scales, by which q, k and v are divided, and the constants that are subtracted from k and v.

    All tensors are float32.
    """

    scales: Tensor  # [3, H]
    k_centre: Tensor  # [H, D]
    v_centre: Tensor  # [H, D]


def sampled_rows(first: int, count: int, num_tokens: int) -> slice:
    """Returns, as a slice, which of a rank's tokens are sampled for the means of k and v.

    `first`: the index in the whole video of the rank's first token, counted from 0. `count`: the number of the rank's
    tokens. `num_tokens`: the number of the video's tokens. All ranks together sample the tokens that a single rank
    would sample.
    """
    every = max(1, num_tokens // _SAMPLED)
    return slice(min(count, -first % every), count, every)


def statistics(k_SHD: Tensor, v_Sd: Tensor) -> Tensor:
    """Returns the statistics of this rank's sampled k and v, [5, d] float64: five numbers for each of the d channels.

    The five numbers are: the sum of k, the sum of v, the number of tokens in each sum, the least v and the largest v.
    `k_SHD`: the keys of the sampled tokens, after norm and rotary embedding. `v_Sd`: the values of the same tokens.
    """
    # A float64 holds these sums of bf16 values exactly, so neither their order nor the number of ranks changes a sum.
    found = v_Sd.new_empty(5, v_Sd.shape[1], dtype=torch.float64)
    for row, x_Sd in enumerate((k_SHD.flatten(1), v_Sd)):
        found[row] = x_Sd.sum(0, dtype=torch.float64)
    found[2], found[3], found[4] = len(v_Sd), math.inf, -math.inf
    if len(v_Sd):
        found[3], found[4] = torch.aminmax(v_Sd, dim=0)
    return found


def scaling(parts_P5d: Tensor, norms_2H: Tensor, *, centres_v: bool = True) -> Scaling:
    """Returns the `Scaling` of all heads.

    `parts_P5d`: the `statistics` of each of the P ranks. `norms_2H`: for each head, an upper bound of the norms of q
    and an upper bound of the norms of k. `centres_v`: whether a constant is subtracted from v; false serves only to
    measure how much the subtraction helps.
    """
    k_sum, v_sum, count = parts_P5d[:, :3].sum(0)
    least, largest = parts_P5d[:, 3].amin(0), parts_P5d[:, 4].amax(0)
    heads = norms_2H.shape[1]
    k_mean, centre, least, largest = (
        rearrange(x.float(), "(H D) -> H D", H=heads) for x in (k_sum / count, v_sum / count, least, largest)
    )
    centre = centre if centres_v else torch.zeros_like(centre)
    # |k - mean| is at most twice the largest norm.
    v_limit = _MARGIN * torch.maximum(largest - centre, centre - least).amax(1)
    limits = torch.stack((norms_2H[0], 2 * norms_2H[1], v_limit))
    return Scaling(scale_of(limits), k_mean, centre)


def largest_norms(weights: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
    """Returns upper bounds [2, H] for the Euclidean norms of each head's q and k.

    `weights`: the weight [d] of the RMS norm of q, and the weight [d] of the RMS norm of k. H is `num_heads`.
    """
    d = weights[0].shape[0]
    return torch.stack([rearrange(w.abs(), "(H D) -> H D", H=num_heads).amax(1) * math.sqrt(d) for w in weights])


def scale_of(limits: Tensor) -> Tensor:
    """Returns the scales by which values are divided, so that all values up to +-`limits` fit into float8."""
    return limits.clamp_min(_TINIEST) / LARGEST[FP8]


def attention_in_fp8(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """Computes softmax(q k^T / sqrt(D)) v in float8, and returns it in the dtype of q.

    k and v must hold all tokens of the video, and B must be 1. The scales of q and k follow from the largest norms that
    occur in q and in k.
    """
    rows, hadamard = sampled_rows(0, k_BLHD.shape[1], k_BLHD.shape[1]), can_rotate(q_BLHD.shape[-1])
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax((0, 1)) for x in (q_BLHD, k_BLHD)]
    q, k, v = (x.flatten(2) for x in (q_BLHD, k_BLHD, v_BLHD))
    found = scaling(statistics(k_BLHD[0, rows], v[0, rows])[None], torch.stack(norms))
    q8, k8, v8 = (
        heads_to_fp8(x, scale, centre, hadamard=hadamard and x is not v)[0]
        for x, scale, centre in zip((q, k, v), found.scales, (None, *found[1:]), strict=True)
    )
    out = fp8_attention(Fp8Heads(q8, k8, v8, found.scales), torch.float32) + found.v_centre
    return out.to(q_BLHD.dtype)


def fp8_attention(heads: Fp8Heads, dtype: torch.dtype) -> Tensor:
    """Returns the attention [B, L, H, D] to these values, in `dtype`, without the constant that was subtracted from v.

    FlashAttention-3 computes it on a GPU, an emulation on a CPU.
    """
    return _fp8_attention(*heads, dtype)


@opaque("wanfast::fp8_attention", shape=lambda q, k, v, scales, dtype: q.new_empty(q.shape, dtype=dtype))
def _fp8_attention(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = (_by_fa3() if q.is_cuda else emulated)(Fp8Heads(q, k, v, scales))
    return out.to(dtype)  # FlashAttention-3 has already rounded to bf16; the emulation has not rounded


def _by_fa3() -> Callable[[Fp8Heads], Tensor]:
    return _fa3_fwd if is_importable("fa3_fwd_interface") else _fa3_of_the_authors


def _fa3_fwd(heads: Fp8Heads) -> Tensor:
    from fa3_fwd_interface import _flash_attn_forward

    out: Tensor = _flash_attn_forward(
        heads.q, heads.k, heads.v, **_descales(heads), softmax_scale=heads.q.shape[-1] ** -0.5, causal=False,
        num_splits=1,
    )[0]  # fmt: skip
    return out


def _fa3_of_the_authors(heads: Fp8Heads) -> Tensor:
    from flash_attn_interface import flash_attn_func

    result = flash_attn_func(heads.q, heads.k, heads.v, **_descales(heads))
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def _descales(heads: Fp8Heads) -> dict[str, Tensor]:
    batch = heads.q.shape[0]
    of_each = (scale.expand(batch, -1).contiguous() for scale in heads.scales)
    return dict(zip(("q_descale", "k_descale", "v_descale"), of_each, strict=True))


def emulated(heads: Fp8Heads) -> Tensor:
    """Emulates on any device what FlashAttention-3 computes on a Hopper GPU: [B, L, H, D] in float32.

    The result has nearly the errors that were measured on a GPU. These errors have two sources: the exponentials of the
    scores are rounded to float8, and the sums over the keys lose their low bits.
    """
    q, k, v = (rearrange(x.float(), "B L H D -> (B H) L D") for x in heads[:3])
    q_scale, k_scale, v_scale = (s.repeat(heads.q.shape[0])[:, None, None] for s in heads.scales)
    scale = q_scale * k_scale * q.shape[-1] ** -0.5
    parts = [_emulated(queries * scale, k, v) for queries in torch.split(q, _QUERIES, dim=1)]
    out: Tensor = rearrange(torch.cat(parts, dim=1) * v_scale, "(B H) L D -> B L H D", B=len(heads.q))
    return out.contiguous()


def _emulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)
    p = (scores - scores.amax(-1, keepdim=True)).exp() * _LARGEST_P
    rounded = p.to(FP8).float()
    out: Tensor = torch.zeros_like(q)
    for keys in range(0, k.shape[1], _STEP):
        step = slice(keys, keys + _STEP)
        out = _added(out, rounded[..., step] @ v[:, step])
    return out / p.sum(-1, keepdim=True)


def _added(total: Tensor, addend: Tensor) -> Tensor:
    """Adds as a tensor core: both numbers lose the bits that are too small for the larger one of them."""
    # The rounding of a GPU is not documented. If the values of v have a common offset, all losses have the same sign.
    # This rounding gives nearly the measured errors, with an offset and without one.
    exponent = torch.frexp(torch.maximum(total.abs(), addend.abs())).exponent
    unit = torch.ldexp(torch.ones_like(total), exponent - _BITS)
    return ((total / unit).trunc() + (addend / unit).trunc()) * unit
