"""This module describes a rank's place in the rank group, and has the operations that all ranks call together.

Every rank runs the same program. The leader does what only one rank can do: it reads the image and writes the video.
Work that can fail on one rank must run inside `together`, so that no rank waits for a rank that stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wanfast.runtime.device.hardware import forget_cuda_graphs
from wanfast.runtime.distributed.cfg_parallel import BothBranches, CfgParallel
from wanfast.runtime.distributed.collectives import all_gather
from wanfast.runtime.distributed.ulysses import Ulysses
from wanfast.runtime.distributed.vae_parallel import SplitRows
from wanfast.runtime.errors import WanFastError, failure, from_failure
from wanfast.runtime.facts.mesh import Axis, Mesh
from wanfast.runtime.models.attention import Sequence, WholeSequence
from wanfast.runtime.models.vae import WHOLE_FRAME, Rows

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Describes a rank and its rank group; by default, the group has only this rank, and nothing is exchanged."""

    device: str
    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    groups: Mapping[Axis, dist.ProcessGroup] = field(default_factory=dict)  # this rank's, for axes longer than one
    whole: dist.ProcessGroup | None = None  # all ranks, if `groups` divides them by branches of guidance

    @property
    def size(self) -> int:
        """Returns the number of ranks in the rank group."""
        return self.mesh.group_size

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def sequence(self) -> Sequence:
        """Returns the `Sequence` object that shares an expert's tokens among the Ulysses ranks."""
        group = self.groups.get("ulysses")
        return Ulysses(group) if group else WholeSequence()

    @property
    def unguided(self) -> Ranks:
        """Returns a `Ranks` object for steps without guidance: all ranks share the tokens of the one branch.

        If both branches run on the same ranks anyway, returns this object.
        """
        if self.whole is None:
            return self
        return dataclasses.replace(self, mesh=Mesh(ulysses=self.size), groups={"ulysses": self.whole}, whole=None)

    def rows(self, latent_rows: int) -> Rows:
        """Returns the `Rows` object that divides the rows of each frame of the VAE among the ranks.

        `latent_rows`: the number of rows (Y) of the latents.
        """
        return SplitRows.of(self.rank, self.size, latent_rows) if self.size > 1 else WHOLE_FRAME

    @property
    def guidance(self) -> BothBranches | CfgParallel:
        """Returns the object that computes the branches of guidance.

        If the mesh's `cfg` is 2, each half of the ranks computes one branch. If it is 1, all ranks compute both
        branches.
        """
        group = self.groups.get("cfg")
        return CfgParallel(group) if group else BothBranches()

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work()` on every rank, and returns on each rank the result of this rank's own call.

        If `work` raises a WanFastError on any rank, all ranks raise a WanFastError. `work` must not use collectives,
        because a rank that failed would not reach them. The VAE may exchange tensors inside `work`, because a rank that
        runs out of memory still does these exchanges (`vae_parallel`).
        """
        error, result = None, None
        try:
            result = work()
        except WanFastError as own:
            error = own
        failures = [found for found in self.gather(failure(error) if error else None) if found]
        if error or failures:
            agreed = error or from_failure(failures[0])
            agreed.is_agreed = True
            raise agreed
        return result  # type: ignore[return-value]  # set if there is no error

    def lead(self, work: Callable[[], T]) -> T:
        """Runs `work()` only on the leader, and returns the leader's result on all ranks.

        The result is pickled and sent to each rank, so it should be small. If `work` raises a WanFastError, all ranks
        raise it.
        """
        outcome: list[Any] = [None, None]  # (result, the document of an error)
        error = None
        try:
            outcome[0] = work() if self.is_leader else None
        except WanFastError as own:
            error, outcome[1] = own, failure(own)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1]:
            agreed = error or from_failure(outcome[1])
            agreed.is_agreed = True
            raise agreed
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Returns the `value` of every rank, in rank order, on all ranks; a value is any picklable object."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Returns the `rows` of all ranks, joined along dim 0, on all ranks.

        Every rank must pass the same number of rows.
        """
        if self.size == 1:
            return rows
        return all_gather(rows).flatten(0, 1)

    def share(self, tensor: Tensor) -> Tensor:
        """Broadcasts the leader's `tensor` into every other rank's `tensor` of the same shape; returns `tensor`."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor


def join(device: str, mesh: Mesh, timeout_s: float) -> Ranks:
    """Connects the ranks by torch.distributed, as torchrun's environment variables say; returns this rank's `Ranks`.

    A collective fails after it has waited `timeout_s` seconds for other ranks. The connections stay open until the
    process ends.
    """
    if mesh.group_size == 1:
        return Ranks(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timeout)

    def own_group(lines: list[list[int]]) -> dist.ProcessGroup:  # a group made for a DeviceMesh has torch's timeout
        return dist.new_subgroups_by_enumeration(lines, timeout=timeout)[0]  # type: ignore[no-untyped-call, no-any-return]

    axes: tuple[Axis, ...] = ("cfg", "ulysses")
    groups = {axis: own_group(mesh.neighbours(axis)) for axis in axes if getattr(mesh, axis) > 1}
    whole = own_group([list(range(mesh.group_size))]) if mesh.cfg > 1 else None
    return Ranks(device, mesh, dist.get_rank(), groups, whole)


@contextlib.contextmanager
def rank_group(device: str, mesh: Mesh, timeout_s: float) -> Iterator[Ranks]:
    """Connects the ranks by `join`, yields this rank's `Ranks`, and closes the connections when the block ends.

    After an error, the connections stay open, because closing may wait for ranks that have ended.
    """
    ranks = join(device, mesh, timeout_s)
    yield ranks
    if ranks.size > 1:
        forget_cuda_graphs()  # NCCL would wait forever for captured graphs that hold its exchanges
        dist.destroy_process_group()  # not after an error, because it may wait for peers that ended
