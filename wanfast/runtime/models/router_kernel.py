"""This Triton kernel scores all pairs of blocks for the router, from the means of the blocks' quarters.

Plain PyTorch first writes a score for each pair of quarters, 16 times as many as pairs of blocks. Then it reads these
scores in several passes. This kernel multiplies the means of a few blocks of queries with those of a few blocks of
keys. In registers, the kernel sums over the 16 pairs of quarters of each pair of blocks, and writes only the sum.
Cost at 75,600 tokens and 40 heads: 57 GFLOP; memory: 97 MB for the means, 56 MB for the scores.
Tensor cores do not multiply float32 values. So three products of TF32 values replace each product of float32 values,
with nearly the same precision. With one product of TF32 values, the router would choose other blocks.

Shapes: B batch, H heads, S quarters of blocks, D head dim, N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16  # blocks of queries, and blocks of keys, of one program


def choice_scores(q_BHSD: Tensor, k_BHSD: Tensor, parts: int, first_blocks: int, last_blocks: int) -> Tensor:
    """Returns the scores [B, H, N, N] of `attention_router.choice_scores`, for float32 means of q and k.

    `parts` is the number of means of a block, a power of two; the last block may have fewer means.
    """
    batch, heads, quarters, head_dim = q_BHSD.shape
    assert q_BHSD.is_contiguous() and k_BHSD.is_contiguous(), "means must be contiguous"
    blocks = triton.cdiv(quarters, parts)
    out = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q_BHSD.device)
    tiles = triton.cdiv(blocks, _TILE)
    _choice_scores[tiles, tiles, batch * heads](
        q_BHSD, k_BHSD, out, quarters, blocks, first_blocks, last_blocks,
        SCALE=head_dim**-0.5, HEAD_DIM=head_dim, LANES=max(16, triton.next_power_of_2(head_dim)), PARTS=parts,
        TILE=_TILE, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _choice_scores(
    q_ptr, k_ptr, out_ptr, quarters, blocks, first, last,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    q = _means(q_ptr + head * quarters * HEAD_DIM, row * PARTS, quarters, HEAD_DIM, LANES, PARTS * TILE)
    k = _means(k_ptr + head * quarters * HEAD_DIM, column * PARTS, quarters, HEAD_DIM, LANES, PARTS * TILE)
    scores = tl.dot(q, k.T, input_precision="tf32x3") * SCALE
    in_tile = tl.arange(0, PARTS * TILE)
    exists = (row * PARTS + in_tile < quarters)[:, None] & (column * PARTS + in_tile < quarters)[None, :]
    scores = _log_sum_exp(tl.where(exists, scores, -1e30), PARTS, TILE)  # a number, so that nothing is inf - inf
    rows, columns = row + tl.arange(0, TILE)[:, None], column + tl.arange(0, TILE)[None, :]
    kept = (columns < first) | (columns >= blocks - last) | (rows == columns)
    place = (head * blocks + rows) * blocks + columns
    tl.store(out_ptr + place, tl.where(kept, float("inf"), scores), (rows < blocks) & (columns < blocks))


@triton.jit
def _means(ptr, first, quarters, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Loads ROWS rows from the row `first`; zeros stand in for rows and lanes that do not exist."""
    rows, lanes = first + tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    return tl.load(ptr + rows * HEAD_DIM + lanes, (rows < quarters) & (lanes < HEAD_DIM), 0.0)


@triton.jit
def _log_sum_exp(scores, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Returns the log of the sum of exp over the pairs of quarters of each pair of blocks, [TILE, TILE]."""
    pairs = tl.permute(tl.reshape(scores, (TILE, PARTS, TILE, PARTS)), (0, 2, 1, 3))
    pairs = tl.reshape(pairs, (TILE, TILE, PARTS * PARTS))
    largest = tl.max(pairs, 2)
    return largest + tl.log(tl.sum(tl.exp(pairs - largest[:, :, None]), 2))
