"""The UMT5 encoder maps a prompt's token ids to one vector per token; the DiT reads the vectors by cross-attention.

The encoder is a pre-norm transformer. Positions enter only through a learned bias on the attention scores. The bias
depends on a bucket of the distance (key position minus query position). Each small distance has its own bucket, and
larger distances share buckets of logarithmic width. All distances from `max_distance` on share the last bucket.
Absolute positions play no role. So a prompt gives the same vectors without padding as with padding and a mask. Unlike
in T5, each block learns its own bias table.

Cost: XXL has 5.68 G parameters, 11.4 GB in bf16. A forward takes 9 GFLOP a token, so reading the weights dominates.
Limit: the attention scores are materialised. The scores take O(B H L^2) bytes: little memory, because prompts have
L <= 512.
In bf16, only RMS and softmax are computed in fp32. The order of operations is the reference's, except that GELU is
fused. Two bf16 implementations differ by a few per cent, so equality with the reference is tested in fp32.

Source: the T5 encoder of Wan-Video/Wan2.2 (42bf4cf), whose parameter names are kept. T5: arXiv 1910.10683;
gated GELU: arXiv 2002.05202; UMT5: arXiv 2304.09151.

Shapes: B batch, L tokens, d model dim, H heads, D head dim, Q query tokens, K key tokens (both L).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from wanfast.runtime.facts.model_spec import UMT5Spec


class UMT5Encoder(nn.Module):
    """This class is the encoder of UMT5; it has no buffers, so that it can be built on the meta device."""

    def __init__(self, spec: UMT5Spec, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.spec = spec
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.dim, dtype=dtype)
        self.blocks = nn.ModuleList(EncoderBlock(spec, dtype) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.dim, spec.eps, dtype)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns one vector per token, [B, L, d]; the vectors of padding have no meaning.

        ids: [B, L] int64; mask: [B, L] with zeros for padding and nonzero values for tokens, or None for no padding.
        """
        buckets = relative_position_buckets(ids.shape[1], self.spec.num_buckets, self.spec.max_distance, ids.device)
        is_padding = None if mask is None else rearrange(mask == 0, "B K -> B 1 1 K")
        x: Tensor = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, is_padding)
        encoded: Tensor = self.norm(x)
        return encoded


class EncoderBlock(nn.Module):
    """Applies attention and a gated feed-forward net, each to a normalised copy of the residual stream."""

    def __init__(self, spec: UMT5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = RMSNorm(spec.dim, spec.eps, dtype)
        self.attn = Attention(spec.dim, spec.attention_dim, spec.num_heads, dtype)
        self.pos_embedding = RelativePositionBias(spec.num_buckets, spec.num_heads, dtype)
        self.norm2 = RMSNorm(spec.dim, spec.eps, dtype)
        self.ffn = GatedFeedForward(spec.dim, spec.ffn_dim, dtype)

    def forward(self, x: Tensor, buckets: Tensor, is_padding: Tensor | None) -> Tensor:
        """Returns x [B, L, d] after the block.

        buckets: [Q, K] int64, from `relative_position_buckets`, for Q query tokens and K key tokens (both L);
        is_padding: [B, 1, 1, K] bool, True for padding; None means no padding.
        """
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), is_padding)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class Attention(nn.Module):
    """Applies multi-head self-attention with an additive position bias; T5 does not scale scores by 1/sqrt(D)."""

    def __init__(self, dim: int, attention_dim: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, attention_dim, bias=False, dtype=dtype)
        self.k = nn.Linear(dim, attention_dim, bias=False, dtype=dtype)
        self.v = nn.Linear(dim, attention_dim, bias=False, dtype=dtype)
        self.o = nn.Linear(attention_dim, dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor, bias: Tensor, is_padding: Tensor | None) -> Tensor:
        """Returns the self-attention [B, L, d] of x [B, L, d].

        bias: [1, H, Q, K], added to the scores, for Q query tokens and K key tokens (both L);
        is_padding: [B, 1, 1, K] bool, True for padding; None means no padding.
        """
        q, k, v = (rearrange(proj(x), "B L (H D) -> B H L D", H=self.num_heads) for proj in (self.q, self.k, self.v))
        scores = q @ k.mT + bias
        if is_padding is not None:
            scores = scores.masked_fill(is_padding, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        out: Tensor = self.o(rearrange(weights @ v, "B H L D -> B L (H D)"))
        return out


class RelativePositionBias(nn.Module):
    """Holds one learned bias for each pair of a relative-position bucket and an attention head."""

    def __init__(self, num_buckets: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads, dtype=dtype)

    def forward(self, buckets: Tensor) -> Tensor:
        """Returns the biases [1, H, Q, K] for the relative-position `buckets` [Q, K] of all pairs of tokens.

        H counts heads, Q counts query tokens, K counts key tokens.
        """
        bias: Tensor = self.embedding(buckets)
        return rearrange(bias, "Q K H -> 1 H Q K")


class GatedFeedForward(nn.Module):
    """Computes fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, dim: int, ffn_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, ffn_dim, bias=False, dtype=dtype), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, ffn_dim, bias=False, dtype=dtype)
        self.fc2 = nn.Linear(ffn_dim, dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, d] to [B, L, d]."""
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class RMSNorm(nn.Module):
    """Computes x / rms(x) in fp32, rounds the result to the dtype of x, and multiplies it by the weight."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., d] to [..., d]."""
        return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def relative_position_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Returns the bucket of every (query, key) pair: [Q, K] int64, Q = K = length.

    The first half of the `num_buckets` buckets is for the query's own token and for keys before the query. The second
    half is for keys after the query. In each half, the first buckets hold one distance each. The other buckets divide
    the distances up to `max_distance` logarithmically (arXiv 1910.10683, section 2.1).
    """
    num_per_side = num_buckets // 2
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    buckets = distance.clamp(max=num_per_side // 2) + num_per_side * (offset > 0)
    # Kernels take these bounds as scalars. So nothing is copied to the device, and CUDA graphs can capture the kernels.
    for first in _first_distances(num_per_side, max_distance):
        buckets += distance >= first
    return buckets


@lru_cache(maxsize=4)
def _first_distances(num_per_side: int, max_distance: int) -> list[int]:
    """Returns the smallest distance of each bucket that is logarithmic, without the first of them."""
    # In float64 and on the host, because the distances 16, 32 and 64 lie exactly on a bound. Rounding on different
    # devices could put these distances into different buckets.
    num_exact = num_per_side // 2
    found: list[int] = []
    for distance in range(num_exact, max_distance + 1):
        octave = math.log(distance / num_exact) / math.log(max_distance / num_exact)
        bucket = min(num_exact + int(octave * (num_per_side - num_exact)), num_per_side - 1)
        found += [distance] * (bucket - num_exact - len(found))
    return found
