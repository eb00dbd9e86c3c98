"""Fully sharded weights (FSDP2) let several GPUs run a model that does not fit on one GPU.

Each of P ranks holds 1/P of every parameter (rows along dim 0). While a block runs, each rank gathers the weights of
the next block. In every forward, a rank receives (P-1)/P of the model over the links, so weights are sharded only if
one GPU cannot hold all of them.
A model is sharded while it is on the meta device. Afterwards, the module `checkpoint` reads on each rank only this
rank's rows.
Source: PyTorch FSDP (arXiv 2304.11277); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # takes seconds to import, so only what shards imports it


def shard(model: nn.Module, device: str) -> None:
    """Shards `model` over the rank group by FSDP2.

    Each of `model.blocks` is one FSDP unit, and the rest of the model is one more unit.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, device)
    for module in (*model.get_submodule("blocks").children(), model):
        fully_shard(module, mesh=mesh)
        if hasattr(module, "encode_text"):
            register_fsdp_forward_method(module, "encode_text")


def is_sharded(parameter: Tensor) -> TypeGuard[DTensor]:
    """Returns whether each rank holds only some rows of a parameter."""
    return hasattr(parameter, "placements")


def own_rows(parameter: Tensor) -> tuple[int, int]:
    """Returns (first, end): this rank holds the parameter's rows first..end-1 along dim 0.

    For an unsharded parameter, this range contains all rows.
    """
    rows = parameter.shape[0] if parameter.dim() else 1  # a scalar is read whole
    if not is_sharded(parameter):
        return 0, rows
    share = -(-rows // parameter.device_mesh.size())
    first = min(rows, parameter.device_mesh.get_local_rank() * share)
    return first, min(rows, first + share)


def from_own_rows(rows: Tensor, parameter: Tensor) -> Tensor:
    """Returns a DTensor that is sharded like `parameter`; each rank passes its own `rows`.

    For an unsharded parameter, returns `rows`.
    """
    if not is_sharded(parameter):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    assert parameter.placements == (Shard(0),)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
