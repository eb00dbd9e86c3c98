"""The mesh of ranks, every axis by name: replica x cfg x ulysses.

* replica: whole videos side by side, for a list of jobs;
* cfg: the two branches of guidance, each on half of a video's ranks;
* ulysses: the tokens of one branch, exchanged for heads around attention.

Axes are laid out with ulysses fastest, so the ranks that talk most are neighbours on one machine. Torch-free: the
parent chooses and checks the mesh before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from wanfast.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of the three axes."""

    replica: int = 1
    cfg: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        return self.replica * self.cfg * self.ulysses

    def place(self, rank: int) -> tuple[int, int, int]:
        """(replica, cfg, ulysses) coordinates of a rank."""
        rest, ulysses = divmod(rank, self.ulysses)
        replica, cfg = divmod(rest, self.cfg)
        return replica, cfg, ulysses

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that share all other coordinates, for every line of the mesh along `axis`."""
        index = ("replica", "cfg", "ulysses").index(axis)
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            place = self.place(rank)
            lines.setdefault(place[:index] + place[index + 1 :], []).append(rank)
        return list(lines.values())


def choose_mesh(
    world_size: int, num_heads: int, *, guided: bool, cfg_parallel: int | None = None, ulysses: int | None = None
) -> Mesh:
    """The mesh for `world_size` ranks: what is asked for, and for the rest the fewest exchanges.

    Guidance splits in two without an exchange inside a forward, so it comes first; tokens take the largest degree that
    divides heads and ranks; ranks beyond that are replicas. Raises ConfigError, listing what fits.
    """
    fitting = [mesh for mesh in _all_meshes(world_size, num_heads) if guided or mesh.cfg == 1]
    asked = [mesh for mesh in fitting if cfg_parallel in (None, mesh.cfg) and ulysses in (None, mesh.ulysses)]
    if not asked:
        options = ", ".join(f"--cfg-parallel {m.cfg} --ulysses {m.ulysses}" for m in fitting)
        wanted = f"--cfg-parallel {cfg_parallel or 'auto'} --ulysses {ulysses or 'auto'}"
        raise ConfigError(f"{wanted} does not fit {world_size} ranks and {num_heads} heads; these do: {options}")
    return min(asked, key=lambda mesh: (mesh.replica, -mesh.cfg))


def _all_meshes(world_size: int, num_heads: int) -> list[Mesh]:
    return [
        Mesh(replica=world_size // (cfg * ulysses), cfg=cfg, ulysses=ulysses)
        for cfg in (1, 2)
        for ulysses in range(1, world_size // cfg + 1)
        if world_size % (cfg * ulysses) == 0 and num_heads % ulysses == 0
    ]
