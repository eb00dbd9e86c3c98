"""Computes whether a model fits on this machine, for 1, 2, 4 and 8 GPUs and for each placement of the experts.

A run computes the needed bytes in the same way, with the module `planning.placement`. If this machine has no GPU, the
needed bytes are compared with the memory of common GPUs that a user can rent.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, Options, parse_size
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import Precision, Scheme, in_8_bits
from wanfast.runtime.facts.mesh import Mesh, choose_mesh
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry, largest_geometry
from wanfast.runtime.machine import host
from wanfast.runtime.machine.gpus import Gpu
from wanfast.runtime.planning import placement
from wanfast.runtime.sampling.guidance import needs_unconditional

HERE = "here"
_COUNTS = (1, 2, 4, 8)
_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class Way:
    """This class says how much memory a model needs on `num_gpus` GPUs if they hold the experts in one `mode`.

    `mode`: "resident", "evicting", "sharded" or "offloaded", as in `placement.modes`.
    """

    num_gpus: int
    mesh: Mesh
    mode: str
    terms: dict[str, int]  # bytes of one GPU at its peak
    free: dict[str, int]  # free bytes of a GPU here, or of each known card
    host_bytes: int
    host_free: int | None  # None for known cards, because their host is unknown

    @property
    def gpu_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def fits_host(self) -> bool:
        return self.host_free is None or self.host_bytes <= self.host_free

    @property
    def fits(self) -> dict[str, bool]:
        return {card: self.fits_host and self.gpu_bytes <= free for card, free in self.free.items()}

    def to_json(self) -> dict[str, Any]:
        sums = {"gpu_bytes": self.gpu_bytes, "fits_host": self.fits_host, "fits": self.fits}
        return dataclasses.asdict(self) | sums


@dataclass(frozen=True, kw_only=True)
class Fit:
    """This class says how much memory a model needs on 1, 2, 4 and 8 GPUs, and whether this memory is free.

    `ways` has one `Way` for each possible pair (number of GPUs, mode). `ways` is sorted by the number of GPUs. Among
    entries with the same number of GPUs, the fastest mode comes first.
    """

    spec: ModelSpec
    geometry: Geometry
    precision: Precision
    vae_precision: Precision
    scheme: Scheme | None
    found: tuple[Gpu, ...]
    ways: tuple[Way, ...]

    @property
    def size(self) -> str:
        return f"{self.geometry.width}x{self.geometry.height}"

    def best(self) -> Way | None:
        """Returns the way that fits on this machine and uses the largest number of GPUs, or None if no way fits.

        If several ways use this number of GPUs, returns the first of them, because `ways` lists the fastest first.
        """
        fitting = [way for way in self.ways if way.fits.get(HERE)]
        return max(fitting, key=lambda way: way.num_gpus, default=None)

    def to_json(self) -> dict[str, Any]:
        spec, geometry, scheme = self.spec, self.geometry, self.scheme
        expert_bytes = {name: memory.expert_bytes(spec.dit, name) for name in _PRECISIONS}
        quantized = {str(scheme): memory.expert_bytes(spec.dit, self.precision, scheme)} if scheme else {}
        return {
            "model": spec.name,
            "needs_gpu": spec.needs_gpu,
            "size": self.size,
            "frames": geometry.frames,
            "tokens": geometry.tokens,
            "precision": self.precision,
            "quantize": scheme,
            "expert_bytes": expert_bytes | quantized,
            "umt5_bytes": {name: memory.umt5_bytes(spec.umt5, name) for name in _PRECISIONS},
            "loop_bytes": memory.loop_bytes(spec, self.precision, geometry.tokens, scheme),
            "vae_precision": self.vae_precision,
            "vae_bytes": memory.vae_bytes(spec, geometry, self.vae_precision),
            "ways": [way.to_json() for way in self.ways],
        }


def fit(given: Options, spec: ModelSpec, found: Sequence[Gpu]) -> Fit:
    """Computes how much memory a model needs on 1, 2, 4 and 8 GPUs, and whether this memory is free.

    `given`: the user's options. `found`: the GPUs of this machine. If `found` is empty, the needed bytes are compared
    with the memory of common GPUs that a user can rent.
    A number of GPUs is left out if the machine has fewer GPUs, or if one video cannot use so many GPUs. The image is
    assumed to have the shape that gives the most tokens at --size. Raises ConfigError for a wrong option in `given`.
    """
    config = EffectiveConfig.of({**NO_VIDEO, **given}, spec)
    precision, scheme, size = config.models.precision, config.models.quantize, parse_size(config.video.size)
    geometry = largest_geometry(spec, *size, config.video.frames)
    host_free = host.available_host_bytes() if found else None
    ways = []
    for num_gpus in _COUNTS:
        mesh = choose_mesh(num_gpus, spec.dit.num_heads, guided=_is_guided(spec))
        if mesh.replica > 1 or (found and num_gpus > len(found)):
            continue
        free = {HERE: min(gpu.free_bytes for gpu in found[:num_gpus])} if found else memory.CARDS
        need = placement.needed(spec, config.models, geometry, mesh)
        on_host = placement.on_host(need, mesh.group_size, num_gpus, free.get(HERE))
        for mode, parts in placement.terms(need, mesh.group_size).items():
            if mode == "sharded" and in_8_bits(scheme):
                continue  # quantized experts are not
            way = Way(
                num_gpus=num_gpus,
                mesh=mesh,
                mode=mode,
                terms=parts,
                free=free,
                host_bytes=on_host.get(mode, 0),
                host_free=host_free,
            )
            ways.append(way)
    return Fit(
        spec=spec,
        geometry=geometry,
        precision=precision,
        vae_precision=config.models.vae_precision or precision,
        scheme=scheme,
        found=tuple(found),
        ways=tuple(ways),
    )


def _is_guided(spec: ModelSpec) -> bool:
    return needs_unconditional(spec.guidance_high_noise) or needs_unconditional(spec.guidance_low_noise)
