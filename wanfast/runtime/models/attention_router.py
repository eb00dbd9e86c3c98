"""The router chooses, for each head and each block of queries, the blocks of keys to which the queries attend.

The share of a block of keys in the softmax is estimated from means. Queries and keys are averaged over quarters of a
block. The score of a pair of blocks is the log of the sum of exp over its 16 pairs of quarters. Quarters reveal a
strong key that the mean of a whole block would hide. Each list has the blocks with the largest scores. Each list also
has the block of the queries themselves, and the blocks of the latent frames that hold given images: the first frame,
and in some videos the last one.
Cost: 16 / block^2 of the products of dense attention, and a sort. Limit: the choice is only an estimate;
`attention_check` measures the error of the result.

Shapes: B batch, L tokens, H heads, D head dim, N blocks, W entries of the longest list, S quarters of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.block_sparse import BlockLists

_PARTS = 4  # of a block, each with a mean of its own


def block_lists(
    q_BLHD: Tensor, k_BLHD: Tensor, block: int, listed: Sequence[int], first_blocks: int, last_blocks: int = 0
) -> BlockLists:
    """Returns lists of `listed[head]` blocks of keys, one list for each head and each block of queries.

    The tokens must be in brick order, and q and k have the same number of tokens. `block` is the number of tokens in a
    block, a multiple of 4. The first `first_blocks` and the last `last_blocks` blocks are in every list.
    """
    chosen = []
    for q_BLD, k_BLD, count in zip(q_BLHD.unbind(2), k_BLHD.unbind(2), listed, strict=True):  # a head at a time
        scores = choice_scores(q_BLD, k_BLD, block, first_blocks, last_blocks)
        chosen.append(F.pad(scores.topk(count).indices.sort().values.int(), (0, max(listed) - count)))
    blocks = torch.stack(chosen, dim=1)
    counts = torch.tensor(listed, dtype=torch.int32, device=blocks.device)
    return BlockLists(counts[:, None].expand(blocks.shape[:-1]).contiguous(), blocks)


def block_order(q_BLHD: Tensor, k_BLHD: Tensor, block: int, first_blocks: int, last_blocks: int = 0) -> Tensor:
    """Returns each key block's place in the order of choice, [H, N, N] int16; a list of n blocks takes places 0 to n-1.

    There is one order for each head and each block of queries. The batch size of q and k must be 1. `block`,
    `first_blocks` and `last_blocks` are those of `block_lists`.
    """
    orders = []
    for q_BLD, k_BLD in zip(q_BLHD.unbind(2), k_BLHD.unbind(2), strict=True):
        scores = choice_scores(q_BLD, k_BLD, block, first_blocks, last_blocks)[0]
        orders.append(scores.argsort(descending=True).argsort().short())
    return torch.stack(orders)


def choice_scores(q_BLD: Tensor, k_BLD: Tensor, block: int, first_blocks: int, last_blocks: int) -> Tensor:
    """Returns the scores [B, N, N] by which the blocks of keys of each list are chosen.

    Blocks that must be in the list have the score infinity: the first `first_blocks` blocks, the last `last_blocks`
    blocks, and the block of the queries themselves.
    """
    scores = block_scores(q_BLD, k_BLD, block)
    scores[..., :first_blocks] = torch.inf
    scores[..., scores.shape[-1] - last_blocks :] = torch.inf
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return scores


def block_scores(q_BLD: Tensor, k_BLD: Tensor, block: int) -> Tensor:
    """Returns a score for each pair of a block of queries and a block of keys, [B, N, N] in float32.

    The score estimates the log of the keys' share in the softmax of the queries.
    """
    part = block // _PARTS
    q, k = _means(q_BLD, part), _means(k_BLD, part)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    missing = -scores.shape[1] % _PARTS  # of the last block
    scores = F.pad(scores, (0, missing, 0, missing), value=-torch.inf)
    return rearrange(scores, "B (N p) (M r) -> B N M (p r)", p=_PARTS, r=_PARTS).logsumexp(-1)


def _means(x_BLD: Tensor, part: int) -> Tensor:
    """Returns the float32 means [B, S, D] of each `part` tokens in a row; the last one may be over fewer."""
    whole = x_BLD.shape[1] // part * part
    means = rearrange(x_BLD[:, :whole], "B (S t) D -> B S t D", t=part).mean(2, dtype=torch.float32)
    rest = x_BLD[:, whole:]
    return torch.cat((means, rest.mean(1, keepdim=True, dtype=torch.float32)), dim=1) if rest.shape[1] else means
