"""This module has exchanges between the ranks of a group that work with all supported torch versions."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns the tensors of all P ranks of a group, in order: [P, ...], in any dtype."""
    gathered = x.new_empty(group.size() if group else dist.get_world_size(), *x.shape)
    _all_gather(as_bytes(gathered), as_bytes(x.contiguous()), group=group)
    return gathered


def as_bytes(x: Tensor) -> Tensor:
    """Returns a view of the memory as bytes, because gloo supports few dtypes."""
    return x.view(-1).view(torch.uint8)
