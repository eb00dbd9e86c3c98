"""The worker half of `wanfast warmup`: compiles an expert's block as a generation would, and keeps what that left.

One block of the true size, whatever its values, is enough, since all blocks of both experts share one graph: no weights
are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.runtime import attention_probe, hardware, metadata, model_files
from wanfast.runtime.artifacts import ArtifactStore
from wanfast.runtime.builders import DTYPES, expert_on_meta
from wanfast.runtime.compilation import (
    cache_inputs,
    check_caches,
    compile_blocks,
    compiled_anew,
    load_caches,
    save_caches,
)
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.model_spec import DiTSpec
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.plan import Job, Plan
from wanfast.runtime.shapes import Geometry
from wanfast.runtime.timing import Stopwatch

_TOO_LARGE = "--size: a block's work does not fit into this GPU's memory: take a smaller --size, or fewer --frames"


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    claim: Callable[[int], bool] | None = None,
    progress: Callable[[int, str, int, int], None] = lambda index, stage, done, total: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(0, result) of the one job: the artifact, and what a block cost with nothing kept and with everything."""
    (job,), ranks = jobs, sessions.ranks
    try:
        yield 0, _warm(job, ranks, lambda stage: progress(0, stage, 0, 0))
    except (WanFastError, torch.OutOfMemoryError) as error:
        if ranks.size > 1 and not (isinstance(error, WanFastError) and error.is_agreed):
            raise
        yield 0, failure(error if isinstance(error, WanFastError) else ConfigError(_TOO_LARGE))


def _warm(job: Job, ranks: Ranks, progress: Callable[[str], None]) -> dict[str, Any]:
    config = job.config
    ranks.together(check_caches)
    ranks.together(lambda: hardware.prepare(config.device, config.precision, config.tf32))
    spec = ranks.together(lambda: model_files.locate(config.model, config.artifacts_dir)).spec
    hardware.use_few_threads(ranks.device, spec.dit.dim)
    choice = attention_probe.agree(config.attention, ranks, DTYPES[config.precision], spec.dit.head_dim)
    config = dataclasses.replace(config, attention=choice.kernel)
    plan = Plan.of(config, spec, job.image_size, placement=job.placement)
    store = ArtifactStore(Path(config.artifacts_dir))
    inputs = cache_inputs(config, spec.dit, plan.geometry.tokens)
    was_there = load_caches(store, inputs, ranks) is not None
    watch = Stopwatch(ranks.device)
    progress("loading what is kept" if was_there else "compiling")
    _forward(plan, ranks, watch)
    folder = save_caches(store, inputs, ranks)
    shape = ("width", "height", "frames", "tokens", "precision", "quantize", "attention", "compile", "device", "mesh")
    return {name: value for name, value in plan.to_json().items() if name in shape} | {
        "output": str(folder),
        "requested": job.requested,
        "versions": metadata.versions(),
        "was_there": was_there,
        "compiled_anew": max(ranks.gather(compiled_anew())),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "hardware": hardware.describe(config.device),
    }


@torch.inference_mode()
def _forward(plan: Plan, ranks: Ranks, watch: Stopwatch) -> None:
    """The first forward of one block, which compiles it, and the second."""
    config, spec = plan.config, dataclasses.replace(plan.spec.dit, num_layers=1)
    model = _block(spec, config, ranks)
    compile_blocks(model, config.compile_mode)
    text = model.encode_text(torch.zeros(1, spec.text_len, spec.text_dim, device=ranks.device))
    rope = rotary_tables(plan.geometry.token_grid, spec.head_dim, ranks.device)
    latent = _latent(plan.geometry, spec.out_channels, ranks.device)
    condition = _latent(plan.geometry, spec.in_channels - spec.out_channels, ranks.device)
    timestep = torch.full((1,), plan.schedule[0].timestep, device=ranks.device)
    for name in ("first", "second"):
        with watch.span(name):
            model(latent, condition, timestep, text, rope)


def _block(spec: DiTSpec, config: EffectiveConfig, ranks: Ranks) -> WanDiT:
    """An expert of one block, held as `builders` would hold it. Its values decide nothing."""
    sharded, attend = config.dit_fsdp == "on", attention_by(config.attention)
    model = expert_on_meta(spec, config.precision, ranks, attend=attend, scheme=config.quantize, sharded=sharded)
    model.to_empty(device=ranks.device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.zero_()
    if not sharded:
        model.fuse_projections()
    return model


def _latent(geometry: Geometry, channels: int, device: str) -> Tensor:
    shape = (1, channels, geometry.latent_frames, geometry.latent_height, geometry.latent_width)
    return torch.zeros(shape, device=device)
