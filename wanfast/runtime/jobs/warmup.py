"""This module is the part of `wanfast warmup` that runs on ranks.

It compiles one block, and stores the compiler's caches. The block is compiled in the same way as by `wanfast generate`.
One block of full size is enough, because all blocks of both experts share one graph. The values of the block's weights
do not matter, so no weights are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.config.models import is_artifacts_dir_named
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.compilation import (
    cache_inputs,
    check_caches,
    compile_blocks,
    compiled_anew,
    load_caches,
    save_caches,
)
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.facts.shapes import Geometry
from wanfast.runtime.machine import packages
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.planning.plan import Job, Plan
from wanfast.runtime.planning.share import Share
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.weights.builders import DTYPES, expert_on_meta

_TOO_LARGE = "--size: a block's work does not fit into memory: use a smaller --size or fewer --frames"


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    share: Share = Share(),  # a warmup is one job of one group
    progress: Callable[[int, str, int, int], None] = lambda index, stage, done, total: None,
    folder: Path | None = None,
    first: int = 0,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields one pair (0, result), because a warmup is one job.

    The result names the stored artifact. It also holds the seconds of each forward of one block.
    """
    (job,), ranks = jobs, sessions.ranks
    try:
        yield 0, _warm(job, ranks, lambda stage: progress(0, stage, 0, 0))
    except (WanFastError, torch.OutOfMemoryError) as error:
        if ranks.size > 1 and not (isinstance(error, WanFastError) and error.is_agreed):
            raise
        yield 0, failure(error if isinstance(error, WanFastError) else ConfigError(_TOO_LARGE))


@hardware.one_out_of_memory_error()
def _warm(job: Job, ranks: Ranks, progress: Callable[[str], None]) -> dict[str, Any]:
    config = job.config
    ranks.together(check_caches)
    ranks.together(lambda: hardware.prepare(config.ranks.device, config.models.precision, config.models.tf32))
    spec = ranks.together(lambda: model_files.locate(config.models.model, config.models.artifacts_dir)).spec
    hardware.use_few_threads(ranks.device, spec.dit.dim)
    choice = attention_probe.agree(config.models.attention, ranks, DTYPES[config.models.precision], spec.dit.head_dim)
    config = config.replace(attention=choice.kernel)
    plan = Plan.of(config, spec, job.image_size, placement=job.placement)
    store = ArtifactStore(Path(config.models.artifacts_dir))
    inputs = cache_inputs(config, spec.dit, plan.geometry.tokens)
    found = load_caches(store, inputs, ranks, is_named=is_artifacts_dir_named(job.requested)) is not None
    watch = Stopwatch(ranks.device)
    progress("loading the stored caches" if found else "compiling")
    _forward(plan, ranks, watch)
    saved = save_caches(store, inputs, ranks)
    shape = ("width", "height", "frames", "tokens", "precision", "quantize", "attention", "compile", "device", "mesh")
    return {name: value for name, value in plan.to_json().items() if name in shape} | {
        "output": str(saved.folder),
        "requested": job.requested,
        "versions": packages.versions(),
        "was_there": not saved.made_here,
        "compiled_anew": max(ranks.gather(compiled_anew())),
        "bytes": sum(file.stat().st_size for file in saved.folder.iterdir()),
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "hardware": hardware.describe(config.ranks.device),
    }


@torch.inference_mode()
def _forward(plan: Plan, ranks: Ranks, watch: Stopwatch) -> None:
    """Runs one block twice; the first forward compiles the block, unless the caches hold it.

    If the ranks of such videos may regroup, a third forward compiles the block for the share of tokens of all ranks.
    """
    config, spec = plan.config, dataclasses.replace(plan.spec.dit, num_layers=1)
    model = _block(spec, config, ranks)
    compile_blocks(model, config.models.compile_mode)
    text = model.encode_text(torch.zeros(1, spec.text_len, spec.text_dim, device=ranks.device))
    rope = rotary_tables(plan.geometry.token_grid, spec.head_dim, ranks.device)
    latent = _latent(plan.geometry, spec.out_channels, ranks.device)
    condition = _latent(plan.geometry, spec.in_channels - spec.out_channels, ranks.device)
    timestep = torch.full((1,), plan.schedule[0].timestep, device=ranks.device)
    for name in ("first", "second"):
        with watch.span(name):
            model(latent, condition, timestep, text, rope)
    if plan.unguided_mesh != plan.mesh:
        with watch.span("regrouped"):
            model(latent, condition, timestep, text, rope, sequence=ranks.unguided.sequence)


def _block(spec: DiTSpec, config: EffectiveConfig, ranks: Ranks) -> WanDiT:
    """Returns an expert of one block, laid out as `builders` does. Its values are zeros, which do not matter."""
    sharded, attend = config.ranks.dit_fsdp == "on", attention_by(config.models.attention)
    model = expert_on_meta(
        spec, config.models.precision, ranks, attend=attend, scheme=config.models.quantize, sharded=sharded
    )
    model.to_empty(device=ranks.device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.zero_()
    if not sharded:
        model.fuse_projections()
    return model


def _latent(geometry: Geometry, channels: int, device: str) -> Tensor:
    shape = (1, channels, geometry.latent_frames, geometry.latent_height, geometry.latent_width)
    return torch.zeros(shape, device=device)
