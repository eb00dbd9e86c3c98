"""Fully sharded weights (FSDP2), for GPUs that a whole model does not fit into.

Each rank keeps 1/P of every parameter (rows along dim 0) and gathers a block's weights while the block before it runs:
P-1 of P parts of the model cross the links in every forward, which is why weights that fit are replicated instead.
A model is sharded while it is on the meta device; `checkpoint` then reads each rank's rows alone.
Source: PyTorch FSDP (arXiv 2304.11277); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard


def shard(model: nn.Module, device: str) -> None:
    """Shard a model that has `blocks` over all ranks of the rank group: one unit a block, the rest one more."""
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, device)
    for module in (*model.get_submodule("blocks").children(), model):
        fully_shard(module, mesh=mesh)
        if hasattr(module, "encode_text"):
            register_fsdp_forward_method(module, "encode_text")


def own_rows(parameter: Tensor) -> tuple[int, int]:
    """The rows (first, end) along dim 0 that this rank keeps of a sharded parameter; all of one that is not."""
    rows = parameter.shape[0] if parameter.dim() else 1  # a scalar is read whole
    if not isinstance(parameter, DTensor):
        return 0, rows
    share = -(-rows // parameter.device_mesh.size())
    first = min(rows, parameter.device_mesh.get_local_rank() * share)
    return first, min(rows, first + share)


def from_own_rows(rows: Tensor, parameter: Tensor) -> Tensor:
    """`rows` of this rank as the sharded parameter that they are part of."""
    if not isinstance(parameter, DTensor):
        return rows
    assert parameter.placements == (Shard(0),)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
