"""This module lets each block of queries attend only to the blocks of keys in its block list.

The softmax is over the keys of these blocks only; nothing else is approximated. On a GPU, FlashAttention-4
computes the result. On a CPU, plain PyTorch gathers these keys for one block of queries at a time; the tests
compare the GPU kernel with this code.

Shapes: B batch, L tokens, H heads, D head dim, c tokens of a block, M blocks of queries, N blocks of keys, W entries of
the longest block list. The last block may have fewer than c tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.attention_kernels import fa4


class BlockLists(NamedTuple):
    """Holds one block list for each head and each block of queries, in the format of FlashAttention-4.

    A block of queries attends only to the blocks of keys in its block list.
    """

    counts: Tensor  # [B, H, M] int32: entries that count in each list
    blocks: Tensor  # [B, H, M, W] int32: numbers of key blocks, ascending in each list; zeros follow in shorter lists


def block_sparse_attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists, block: int) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v, [B, L, H, D] in the dtype of q.

    The softmax of each block of queries is only over the keys in its block list. `block`: the number c of tokens in a
    block. Raises ValueError if a block list is empty. For this check, the host waits for the GPU.
    """
    if not bool((lists.counts > 0).all()):
        raise ValueError("a list has no block of keys: list at least 1 block for each block of queries")
    return listed_attention(q_BLHD, k_BLHD, v_BLHD, lists, block)


def listed_attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists, block: int) -> Tensor:
    """Returns the same as `block_sparse_attention`, but does not check whether a block list is empty.

    The caller must ensure that no block list is empty. The host does not wait for the GPU.
    """
    return (_by_fa4 if q_BLHD.is_cuda else emulated)(q_BLHD, k_BLHD, v_BLHD, lists, block)


def _by_fa4(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, block: int) -> Tensor:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    sparse = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(lists.counts),  # no block has a mask inside
        mask_block_idx=lists.blocks,  # so that nothing reads these
        full_block_cnt=lists.counts,
        full_block_idx=lists.blocks,
        block_size=(block, block),
    )
    return fa4(q, k, v, block_sparse_tensors=sparse)


def emulated(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists, block: int) -> Tensor:
    """Computes `block_sparse_attention` in plain PyTorch, on any device and in any dtype.

    No block list may be empty. The result of a head does not depend on the block lists of other heads, not even in its
    last bits.
    """
    # Padding of a list may change the last bits. So heads are computed together only if no list must be padded for it.
    out, longest = torch.empty_like(q_BLHD), lists.counts.amax((0, 2))
    for count in set(longest.tolist()):
        heads = (longest == count).nonzero().flatten()
        own = BlockLists(lists.counts[:, heads], lists.blocks[:, heads, :, :count])
        out[:, :, heads] = _emulated(q_BLHD[:, :, heads], k_BLHD[:, :, heads], v_BLHD[:, :, heads], own, block)
    return out


def _emulated(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists, block: int) -> Tensor:
    batch, length = k_BLHD.shape[:2]
    k, v = (_blocks(x, block) for x in (k_BLHD, v_BLHD))
    heads = torch.arange(k.shape[0], device=k.device)[:, None]
    in_block, entry = (torch.arange(n, device=k.device) for n in (block, lists.blocks.shape[-1]))
    outs = []
    for number, queries in enumerate(torch.split(q_BLHD, block, dim=1)):
        listed, counts = (x[:, :, number].flatten(0, 1) for x in (lists.blocks, lists.counts))
        exists = (listed[..., None] * block + in_block < length) & (entry < counts[:, None])[..., None]
        keys, values = (x[heads, listed].flatten(1, 2) for x in (k, v))
        q = rearrange(queries, "B c H D -> (B H) c D")
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=exists.flatten(1)[:, None])
        outs.append(rearrange(out, "(B H) c D -> B c H D", B=batch))
    return torch.cat(outs, dim=1)


def _blocks(x_BLHD: Tensor, block: int) -> Tensor:
    """Returns [B*H, N, c, D]; zeros fill the last block."""
    x = F.pad(x_BLHD, (0, 0, 0, 0, 0, -x_BLHD.shape[1] % block))
    return rearrange(x, "B (N c) H D -> (B H) N c D", c=block)
