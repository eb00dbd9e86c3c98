"""This module gathers tensors from ranks; it works with all supported torch versions, and with gloo and NCCL."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gathers x from all P ranks of a process group; returns [P, *x.shape] in rank order. Any dtype is possible."""
    gathered = x.new_empty(group.size() if group else dist.get_world_size(), *x.shape)
    _all_gather(as_bytes(gathered), as_bytes(x.contiguous()), group=group)
    return gathered


def as_bytes(x: Tensor) -> Tensor:
    """Returns a flat uint8 view of a contiguous tensor, because gloo supports few dtypes."""
    return x.view(-1).view(torch.uint8)
