"""This module measures the error of an attention's output, by comparing a few rows with exactly computed rows.

A few exact rows cost little: 64 of 75,600 queries are a thousandth of a dense call. So each run can measure the error
for its own weights and its own video. The error has two causes, and the measurement contains both: keys that were left
out, and rounding.

Shapes: L tokens, H heads, D head dim, S sampled queries of each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINIEST = 1e-30  # so that an output of zeros has an error


def sampled_errors(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, out_LHD: Tensor, rows_HS: Tensor) -> Tensor:
    """Returns each head's relative error [H], float32: |out - exact| / |exact| over the queries `rows_HS` of this head.

    The exact rows are computed in float32, one head at a time.
    """
    by_head = (x.unbind(1) for x in (q_LHD, k_LHD, v_LHD, out_LHD))
    return torch.stack([_error(*one) for one in zip(*by_head, rows_HS, strict=True)])


def _error(q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, out_LD: Tensor, rows_S: Tensor) -> Tensor:
    scores = q_LD[rows_S].float() @ k_LD.float().T * q_LD.shape[-1] ** -0.5
    exact = scores.softmax(-1) @ v_LD.float()
    norms = torch.stack((out_LD[rows_S].float() - exact, exact)).flatten(1).square().sum(1).sqrt()
    return norms[0] / norms[1].clamp_min(_TINIEST)
