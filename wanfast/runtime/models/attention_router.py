"""The router chooses, for each head and each block of queries, the blocks of keys to which the queries attend.

The chosen blocks form a block list. Two kinds of blocks are always chosen first: the block of the queries themselves,
and the blocks of the latent frames that hold given images (the first frame, and in some videos the last one). The
blocks with the largest scores fill the rest of the list. Of blocks with equal scores, the router prefers the block with
the smaller index.

A score estimates the share of a block of keys in the softmax of a block of queries. Each block is divided into four
quarters, and each quarter is replaced by the mean of its queries or keys. A pair of blocks then has 16 attention
scores, one for each pair of quarters. The score of the pair of blocks is the logsumexp of these 16 attention scores.
Quarters reveal a strong key that the mean of a whole block would hide.
On a GPU, a Triton kernel computes the scores of all heads; in all other cases, plain PyTorch does, a head at a time.
Cost: 16 products for each pair of blocks (dense attention needs block^2), and a sort. Memory at 75,600 tokens and 40
heads: 0.3 GB while the scores are sorted. (For comparison, the result of attention takes 0.8 GB in bf16.) Limit: the
choice is only an estimate; `attention_check` measures the error of the result.

Shapes: B batch, L tokens, H heads, D head dim, N blocks, W entries of the longest block list, S quarters of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.block_sparse import BlockLists
from wanfast.runtime.models.kernels import HAS_KERNELS

if HAS_KERNELS:
    from wanfast.runtime.models import router_kernel

_PARTS = 4  # of a block, each with a mean of its own


def block_lists(
    q_BLHD: Tensor, k_BLHD: Tensor, block: int, listed: Sequence[int], first_blocks: int, last_blocks: int = 0
) -> BlockLists:
    """Returns a block list for each head and each block of queries.

    The tokens must be in brick order (see `bricks`), and q and k have the same number of tokens.
    `block`: the number of tokens in a block, a multiple of 4. `listed`: for each head, the length of its block lists.
    Three kinds of blocks are chosen first: the first `first_blocks` blocks, the last `last_blocks` blocks, and the
    block of the queries themselves. The blocks with the largest scores fill the rest of the list.
    Raises ValueError if a length in `listed` is below 1.
    """
    if min(listed) < 1:
        raise ValueError("a list has no block of keys: list at least 1 block for each head")
    order = _in_order(choice_scores(q_BLHD, k_BLHD, block, first_blocks, last_blocks))[..., : max(listed)]
    counts = torch.tensor(listed, dtype=torch.int32).to(order.device, non_blocking=True)[:, None]  # the host goes on
    behind = torch.arange(max(listed), device=order.device) >= counts[..., None]  # the end of a shorter list
    blocks = order.masked_fill(behind, order.shape[-2]).sort().values.int().masked_fill_(behind, 0)
    return BlockLists(counts.expand(blocks.shape[:-1]).contiguous(), blocks)


def block_order(q_BLHD: Tensor, k_BLHD: Tensor, block: int, first_blocks: int, last_blocks: int = 0) -> Tensor:
    """Returns the place of each block of keys in the order of scores, as int16 [H, N, N].

    The axes are: head, block of queries, block of keys. Place 0 has the largest score. So a block list of length n
    holds the blocks at the places 0 to n-1. The batch size of q and k must be 1. The arguments are those of
    `block_lists`.
    """
    scores = choice_scores(q_BLHD, k_BLHD, block, first_blocks, last_blocks)[0]
    return torch.stack([_in_order(of_head).argsort().short() for of_head in scores])


def _in_order(scores: Tensor) -> Tensor:
    """Returns the numbers of the blocks, the one with the largest score first."""
    return scores.sort(descending=True, stable=True).indices


def choice_scores(q_BLHD: Tensor, k_BLHD: Tensor, block: int, first_blocks: int, last_blocks: int) -> Tensor:
    """Returns the scores [B, H, N, N] by which the router chooses blocks.

    The axes are: batch, head, block of queries, block of keys. Three kinds of blocks of keys are chosen first, so their
    score is infinity: the first `first_blocks` blocks, the last `last_blocks` blocks, and the block of the queries
    themselves. The arguments are those of `block_lists`.
    """
    if _by_kernel(q_BLHD):
        q, k = (rearrange(_means(x, block // _PARTS), "B S H D -> B H S D").contiguous() for x in (q_BLHD, k_BLHD))
        return router_kernel.choice_scores(q, k, _PARTS, first_blocks, last_blocks)
    heads = zip(q_BLHD.unbind(2), k_BLHD.unbind(2), strict=True)
    scores = torch.stack([block_scores(q_BLD, k_BLD, block) for q_BLD, k_BLD in heads], dim=1)
    scores[..., :first_blocks] = torch.inf
    scores[..., scores.shape[-1] - last_blocks :] = torch.inf
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return scores


def block_scores(q_BLD: Tensor, k_BLD: Tensor, block: int) -> Tensor:
    """Returns a score for each pair of a block of queries and a block of keys, [B, N, N] in float32.

    For one block of queries, a block of keys with a larger score has a larger estimated share in the softmax. Scores of
    different blocks of queries cannot be compared.
    """
    part = block // _PARTS
    q, k = _means(q_BLD, part), _means(k_BLD, part)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    missing = -scores.shape[1] % _PARTS  # of the last block
    scores = F.pad(scores, (0, missing, 0, missing), value=-torch.inf)
    return rearrange(scores, "B (N p) (M r) -> B N M (p r)", p=_PARTS, r=_PARTS).logsumexp(-1)


def _means(x: Tensor, part: int) -> Tensor:
    """Returns the float32 means [B, S, ...] of each `part` of the L tokens of x [B, L, ...].

    The last mean may be over fewer tokens.
    """
    whole = x.shape[1] // part * part
    means = rearrange(x[:, :whole], "B (S t) ... -> B S t ...", t=part).mean(2, dtype=torch.float32)
    rest = x[:, whole:]
    return torch.cat((means, rest.mean(1, keepdim=True, dtype=torch.float32)), dim=1) if rest.shape[1] else means


def _by_kernel(x: Tensor) -> bool:
    return HAS_KERNELS and x.is_cuda
