"""This Triton kernel scores all pairs of blocks for the router, from the means of the blocks' quarters.

A pair of blocks has 16 pairs of quarters, each with a score of its own. Plain PyTorch writes these 16 scores to memory,
and reads them several times. This kernel keeps them in registers, and writes only one score for each pair of blocks.
Each program of the kernel scores 64 blocks of queries with 64 blocks of keys.
Cost at 75,600 tokens and 40 heads: 57 GFLOP; memory: 97 MB for the means, 56 MB for the scores.
Tensor cores do not multiply float32 values. So each mean is split into a sum of two float16 values, and three products
of float16 values replace one product of float32 values. One product of float16 values would not be precise enough: the
router would choose a few wrong blocks. On an H200, the scores differ from float64 by 4.7e-7 at most, and the 57 GFLOP
take 1.4 ms (LOG.md).
Limit: means must be smaller than 65,504. The RMSNorm of 5120 channels returns at most 72 times its weight.

Shapes: B batch, H heads, S quarters of blocks, D head dim, N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64  # blocks of queries, and blocks of keys, of one program
_NONE: tl.constexpr = tl.constexpr(-1e30)  # the score of missing quarters; finite, so that nothing is inf - inf


def choice_scores(q_BHSD: Tensor, k_BHSD: Tensor, parts: int, first_blocks: int, last_blocks: int) -> Tensor:
    """Returns the scores [B, H, N, N] of `attention_router.choice_scores`, for float32 means of q and k.

    `parts` is the number of means of a block, a power of two; the last block may have fewer means. The first
    `first_blocks` and the last `last_blocks` blocks of keys have the score infinity.
    """
    batch, heads, quarters, head_dim = q_BHSD.shape
    assert q_BHSD.is_contiguous() and k_BHSD.is_contiguous(), "means must be contiguous"
    blocks = triton.cdiv(quarters, parts)
    out = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q_BHSD.device)
    tiles = triton.cdiv(blocks, _TILE)
    _choice_scores[tiles, tiles, batch * heads](
        *_split(q_BHSD), *_split(k_BHSD), out, quarters, blocks, first_blocks, last_blocks,
        SCALE=head_dim**-0.5, HEAD_DIM=head_dim, LANES=max(16, triton.next_power_of_2(head_dim)), PARTS=parts,
        TILE=_TILE, num_warps=4,
    )  # fmt: skip
    return out


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the float16 values nearest to x, and those nearest to what remains of x."""
    near = x.half()
    return near, (x - near).half()


@triton.jit
def _choice_scores(
    q_ptr, q_rest_ptr, k_ptr, k_rest_ptr, out_ptr, quarters, blocks, first, last,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    in_tile, lanes = tl.arange(0, TILE), tl.arange(0, LANES)
    rows, columns = tl.program_id(0) * TILE + in_tile, tl.program_id(1) * TILE + in_tile
    at_head = head * quarters * HEAD_DIM
    largest = tl.full((TILE, TILE), _NONE, tl.float32)
    total = tl.zeros((TILE, TILE), tl.float32)  # the sum of exp(score - largest)
    for pair in range(PARTS * PARTS):
        of_q, of_k = rows * PARTS + pair // PARTS, columns * PARTS + pair % PARTS
        q_at = at_head + of_q[:, None] * HEAD_DIM + lanes[None, :]
        k_at = at_head + of_k[None, :] * HEAD_DIM + lanes[:, None]
        q_exists = (of_q < quarters)[:, None] & (lanes < HEAD_DIM)[None, :]
        k_exists = (of_k < quarters)[None, :] & (lanes < HEAD_DIM)[:, None]
        q, k = tl.load(q_ptr + q_at, q_exists, 0.0), tl.load(k_ptr + k_at, k_exists, 0.0)
        scores = tl.dot(tl.load(q_rest_ptr + q_at, q_exists, 0.0), k)
        scores = tl.dot(q, tl.load(k_rest_ptr + k_at, k_exists, 0.0), scores)
        scores = tl.dot(q, k, scores) * SCALE
        scores = tl.where((of_q < quarters)[:, None] & (of_k < quarters)[None, :], scores, _NONE)
        before, largest = largest, tl.maximum(largest, scores)
        total = total * tl.exp(before - largest) + tl.exp(scores - largest)
    at_row, at_column = rows[:, None], columns[None, :]
    kept = (at_column < first) | (at_column >= blocks - last) | (at_row == at_column)
    place = (head * blocks + at_row) * blocks + at_column
    exists = (at_row < blocks) & (at_column < blocks)
    tl.store(out_ptr + place, tl.where(kept, float("inf"), largest + tl.log(total)), exists)
