"""Gathers sharded parameters by a plain collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def whole(tensor: Tensor) -> Tensor:
    """The whole of a parameter that may be sharded.

    Not by `DTensor.full_tensor`: its functional collectives once crashed a forked rank (torch 2.13, gloo; LOG.md).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.placements == (Shard(0),)
    group = tensor.device_mesh.get_group()
    shards: list[Tensor] = [tensor] * dist.get_world_size(group)
    dist.all_gather_object(shards, tensor.to_local(), group=group)
    return torch.cat(shards)
