"""This module measures the error of attention: it compares a few rows of the output with exactly computed rows.

A row is the output for one query. A few exact rows cost little: 64 of 75,600 queries are a thousandth of a dense call.
So each run can measure the error for its own weights and its own video.
`sampled_errors` measures the error of a call that ran. This error comes from keys that were left out, and from
rounding. `errors_by_length` and `fp8_errors` are for a calibration. They measure the error that a sparse call or a
float8 call would have. For this, they compute only the sampled rows of the call. torch's flash kernel computes the
exact rows; in bf16, its own error is about 0.002.
If several ranks share the tokens, each rank attends to its own keys, and the parts are joined by their log-sum-exp.

Shapes: L tokens of a rank, H heads, D head dim, S sampled queries of each head, P ranks, N blocks,
E lengths: the numbers of blocks of keys that `errors_by_length` tries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from wanfast.runtime.models.attention_fp8 import attention_in_fp8

_TINIEST = 1e-30  # so that an output of zeros has an error


def sampled_errors(
    q_LHD: Tensor,
    k_LHD: Tensor,
    v_LHD: Tensor,
    out_LHD: Tensor,
    rows_HS: Tensor,
    first: int = 0,
    stack: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(0),
    constant_HD: Tensor | None = None,
) -> Tensor:
    """Returns each head's relative error [H], float32: |out - exact| / |exact| over the queries `rows_HS` of this head.

    q, k, v and out hold this rank's tokens. After the tokens, q and out may have padding; k and v must have none.
    `rows_HS`: for each head, the indices of the sampled queries in the whole video. `first`: the index of this rank's
    first token in the whole video. `stack(x)` returns the tensors x of all ranks as one tensor [P, ...]. `constant_HD`
    is added to each row of out.
    """
    place, heads = rows_HS - first, torch.arange(rows_HS.shape[0], device=rows_HS.device)[:, None]
    is_own = ((place >= 0) & (place < len(k_LHD)))[..., None]
    place = place.clamp(0, len(q_LHD) - 1)
    own = torch.stack([torch.where(is_own, x[place, heads], 0) for x in (q_LHD, out_LHD)])
    queries, out = stack(own).sum(0)
    out = out if constant_HD is None else out + constant_HD[:, None]
    parts = stack(_attended(queries, k_LHD, v_LHD))
    exact = (parts[..., :-1] * parts[..., -1:].softmax(0)).sum(0)
    return _relative_errors(out, exact)


def errors_by_length(
    q_LHD: Tensor,
    k_LHD: Tensor,
    v_LHD: Tensor,
    rows_HS: Tensor,
    order_HNN: Tensor,
    block: int,
    lengths: Sequence[int],
) -> Tensor:
    """Returns the relative error [H, E] that sparse attention would have in each head, for each of the E `lengths`.

    A length n means that each query reads only the n blocks of keys with the largest scores. `rows_HS`: for each head,
    the indices of the queries on which the error is measured. `order_HNN`: for each head and each block of queries, the
    place of each block of keys in the order of the scores, from `attention_router.block_order`. `block`: the number of
    tokens in a block. All values are computed in float32, so that the errors contain no rounding.
    """
    errors = []
    for head, rows in enumerate(rows_HS):  # one head's scores at a time
        q, k, v = q_LHD[rows, head].float(), k_LHD[:, head].float(), v_LHD[:, head].float()
        scores = q @ k.T * q.shape[-1] ** -0.5
        place = order_HNN[head][rows // block].repeat_interleave(block, dim=1)[:, : len(k)]
        exact = scores.softmax(-1) @ v
        outs = [scores.masked_fill(place >= length, -torch.inf).softmax(-1) @ v for length in lengths]
        errors.append(torch.stack([(out - exact).norm() for out in outs]) / exact.norm().clamp_min(_TINIEST))
    return torch.stack(errors)


def fp8_errors(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, rows_HS: Tensor) -> Tensor:
    """Returns the relative error [H] that float8 causes in each head, measured on the queries `rows_HS`."""
    queries = q_LHD[rows_HS, torch.arange(len(rows_HS), device=rows_HS.device)[:, None]]
    exact = _attended(queries, k_LHD, v_LHD)[..., :-1]
    out = attention_in_fp8(rearrange(queries, "H S D -> 1 S H D").contiguous(), k_LHD[None], v_LHD[None])
    return _relative_errors(rearrange(out, "1 S H D -> H S D"), exact)


def _relative_errors(out_HSD: Tensor, exact_HSD: Tensor) -> Tensor:
    """Returns |out - exact| / |exact| of each head [H], float32."""
    norms = torch.stack((out_HSD.float() - exact_HSD, exact_HSD)).flatten(2).square().sum(2).sqrt()
    return norms[0] / norms[1].clamp_min(_TINIEST)


def _attended(q_HSD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> Tensor:
    """Returns the attention to these keys, and the log-sum-exp of its scores behind it, [H, S, D + 1] in float32."""
    H, S, D = q_HSD.shape
    if not len(k_LHD):
        return torch.cat((q_HSD.new_zeros(H, S, D), q_HSD.new_full((H, S, 1), -torch.inf)), dim=-1).float()
    tensors = [q_HSD.unsqueeze(0), *(rearrange(x, "L H D -> 1 H L D") for x in (k_LHD, v_LHD))]
    if q_HSD.is_cuda:
        attend, tensors = torch.ops.aten._scaled_dot_product_flash_attention, [x.bfloat16() for x in tensors]
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(*tensors)[:2]
    return torch.cat((out[0].float(), lse[0].float().unsqueeze(-1)), dim=-1)
