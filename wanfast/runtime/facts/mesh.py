"""The mesh arranges the ranks along three named axes: replica x cfg x ulysses.

* replica: the replicas make different videos at the same time; all replicas take jobs from the same list;
* cfg: if cfg is 2, each half of a replica's ranks computes one branch of guidance. In a step without guidance, the
  ranks regroup: all ranks of the replica then lie along the ulysses axis;
* ulysses: ranks share the tokens of a branch; during self-attention, each rank instead has all tokens of some heads.

A replica is a *rank group*: its ranks make one video together, and fail together. Rank groups share only the list of
jobs. Therefore, if one rank group fails, the others continue. One machine may have several rank groups. If a run uses
several machines, one rank group contains all their ranks.
The ulysses axis exchanges the most data, so ranks with neighbouring numbers lie along this axis. This module does not
import torch, because the parent chooses and checks the mesh before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wanfast.runtime.errors import ConfigError

Axis = Literal["cfg", "ulysses"]  # the axes of a rank group


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Holds the number of ranks along each of the three axes: replica, cfg and ulysses."""

    replica: int = 1
    cfg: int = 1
    ulysses: int = 1

    @property
    def group_size(self) -> int:
        """Returns the number of ranks in a rank group."""
        return self.cfg * self.ulysses

    @property
    def size(self) -> int:
        """Returns the number of ranks in all rank groups."""
        return self.replica * self.group_size

    def unguided(self, num_heads: int) -> Mesh:
        """Returns the mesh of a step without guidance: all ranks of a rank group share the tokens of the one branch.

        If the number of these ranks does not divide `num_heads`, the mesh stays as it is, and both halves of the rank
        group do the same work.
        """
        return self if num_heads % self.group_size else Mesh(replica=self.replica, ulysses=self.group_size)

    def neighbours(self, axis: Axis) -> list[list[int]]:
        """Divides the ranks of one rank group into lists; the ranks of each list are neighbours along `axis`.

        With cfg 2 and ulysses 2, the lists along ulysses are [[0, 1], [2, 3]]. The lists along cfg are
        [[0, 2], [1, 3]].
        """
        ranks = range(self.group_size)
        if axis == "ulysses":
            return [list(ranks[first : first + self.ulysses]) for first in ranks[:: self.ulysses]]
        return [list(ranks[first :: self.ulysses]) for first in range(self.ulysses)]


def choose_mesh(
    num_gpus: int,
    num_heads: int,
    *,
    nnodes: int = 1,
    guided: bool = True,
    cfg_parallel: int | None = None,
    ulysses: int | None = None,
) -> Mesh:
    """Returns the mesh for `nnodes` machines with `num_gpus` ranks each.

    `cfg_parallel` and `ulysses` are the requested degrees; None lets this function choose. The mesh gives one video as
    many ranks as possible. The ulysses degree must divide `num_heads`. Without guidance (`guided` is False), cfg is 1.
    This function prefers cfg 2 to a larger ulysses degree, because the branches exchange nothing inside a forward.
    If the requested degrees do not fit, raises ConfigError with the degrees that fit.
    """
    fitting = [mesh for mesh in _all_meshes(num_gpus, nnodes, num_heads) if guided or mesh.cfg == 1]
    asked = [mesh for mesh in fitting if cfg_parallel in (None, mesh.cfg) and ulysses in (None, mesh.ulysses)]
    if not fitting:
        raise ConfigError(
            f"--nnodes {nnodes} --num-gpus {num_gpus}: {num_heads} attention heads cannot be shared by "
            f"{num_gpus * nnodes} ranks: use another --nnodes or --num-gpus; to make the videos of a list on many "
            "machines, use --ray"
        )
    if not asked:
        options = ", ".join(f"--cfg-parallel {m.cfg} --ulysses {m.ulysses}" for m in fitting)
        wanted = f"--cfg-parallel {cfg_parallel or 'auto'} --ulysses {ulysses or 'auto'}"
        unguided = "" if guided else " without guidance"
        ranks = f"{num_gpus * nnodes} ranks" + (f" of {nnodes} machines" if nnodes > 1 else "")
        raise ConfigError(
            f"{wanted}{unguided} does not fit {ranks} and {num_heads} attention heads: use one of: {options}"
        )
    return min(asked, key=lambda mesh: (mesh.replica, -mesh.cfg))


def _all_meshes(num_gpus: int, nnodes: int, num_heads: int) -> list[Mesh]:
    world_size = num_gpus * nnodes
    return [
        Mesh(replica=world_size // (cfg * ulysses), cfg=cfg, ulysses=ulysses)
        for cfg in (1, 2)
        for ulysses in range(1, world_size // cfg + 1)
        if num_heads % ulysses == 0 and (cfg * ulysses == world_size if nnodes > 1 else num_gpus % (cfg * ulysses) == 0)
    ]
