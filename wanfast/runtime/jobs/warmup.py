"""This module is the part of `wanfast warmup` that runs on ranks.

It compiles one block, and stores the compiler's caches. The block is compiled in the same way as by `wanfast generate`.
One block of full size is enough, because all blocks of both experts share the same graphs. The values of the block's
weights do not matter, so no weights are read.
With lossy attention (sparse or float8), the block also runs as a lossy layer, so that the kernels of lossy attention
are compiled too. All lossy layers use the same kernels, so one lossy layer is enough. There is one exception: if a plan
of densities computes some heads in float8, each number of float8 heads needs a kernel of its own. Then the block runs
once for each number of float8 heads that a layer of the plan has.
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
from wanfast.runtime.engine.loading import lossy_attention
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.facts.choices import BRANCHES, Attention
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.facts.shapes import Geometry
from wanfast.runtime.jobs.loop import FrameFileFn
from wanfast.runtime.machine import packages
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.bricks import RASTER
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.planning.progress import ProgressFn
from wanfast.runtime.planning.share import Share
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.attention_plans import densities_of_any_run
from wanfast.runtime.weights.builders import DTYPES, expert_on_meta

_TOO_LARGE = "--size: a block's work does not fit into memory: use a smaller --size or fewer --frames"


def run(
    jobs: list[Job],
    sessions: Sessions,
    *,
    share: Share = Share(),  # a warmup is one job of one group
    progress: ProgressFn = lambda index, stage, done, total: None,
    frames_of: FrameFileFn | None = None,
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
    densities = ranks.lead(lambda: densities_of_any_run(config, spec.dit))
    plan = Plan.of(config, spec, job.image_size, placement=job.placement, densities=densities)
    if plan.sparsity and plan.sparsity.has_fp8:
        attention_probe.require_fp8(ranks, config.models.precision, spec.dit.head_dim)
    store = ArtifactStore(Path(config.models.artifacts_dir))
    inputs = cache_inputs(plan, choice.exact)
    found = load_caches(store, inputs, ranks, is_named=is_artifacts_dir_named(job.requested)) is not None
    watch = Stopwatch(ranks.device)
    progress("loading the stored caches" if found else "compiling")
    _forward(plan, ranks, watch, choice.exact)
    saved = save_caches(store, inputs, ranks)
    shape = ("width", "height", "frames", "tokens", "precision", "quantize", "attention", "compile", "device", "mesh")
    return {name: value for name, value in plan_json(plan).items() if name in shape} | {
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
def _forward(plan: Plan, ranks: Ranks, watch: Stopwatch, exact: Attention) -> None:
    """Runs one block twice; the first forward compiles the block, unless the caches hold it.

    `exact` names the kernel of exact attention. If the ranks of such videos may regroup, a third forward compiles the
    block for the share of tokens of all ranks. With lossy attention, further forwards are lossy.
    """
    config, spec, attend = plan.config, dataclasses.replace(plan.spec.dit, num_layers=1), attention_by(exact)
    model = _block(spec, config, ranks, attend)
    lossy = lossy_attention(config.models.attention, attend, spec.num_heads, ranks)
    if lossy:
        lossy.use_in(model)
    compile_blocks(model, config.models.compile_mode)
    text = model.encode_text(torch.zeros(1, spec.text_len, spec.text_dim, device=ranks.device))
    rope = rotary_tables(plan.geometry.token_grid, spec.head_dim, ranks.device)
    latent = _latent(plan.geometry, spec.out_channels, ranks.device)
    condition = _latent(plan.geometry, spec.in_channels - spec.out_channels, ranks.device)
    timestep = torch.full((1,), plan.schedule[0].timestep, device=ranks.device)
    order = lossy.start(plan) if lossy else RASTER

    def run(grouping: Ranks, layer: int = 0) -> None:
        if lossy:
            lossy.enter(layer)
        model(latent, condition, timestep, text, rope, sequence=grouping.sequence, order=order)

    for name in ("first", "second"):
        with watch.span(name):
            run(ranks)
    regrouped = [ranks.unguided] if plan.unguided_mesh != plan.mesh else []
    for grouping in regrouped:
        with watch.span("regrouped"):
            run(grouping)
    if lossy:
        with watch.span("lossy"):
            for grouping in (ranks, *regrouped):
                branches = BRANCHES if grouping is ranks else BRANCHES[:1]  # of a step without guidance
                for step, layer in _lossy_calls(plan, grouping):
                    lossy.begin(step, "high_noise", branches, "prompt", grouping)
                    run(grouping, layer)
        lossy.finish()


def _lossy_calls(plan: Plan, ranks: Ranks) -> list[tuple[int, int]]:
    """Returns a (step, layer) for each kind of lossy call; kinds differ in how many heads of each rank are in float8.

    Heads that are in float8 are counted only for a plan of sparse attention.
    """
    if plan.sparsity is None:
        return [(0, 0)]
    kinds: dict[tuple[int, ...], tuple[int, int]] = {}
    for step in plan.sparsity.bands:
        for layer in range(plan.sparsity.num_layers):
            if listed := plan.sparsity.listed(step, layer):
                shared = plan.sparsity.assigned(listed, ranks.mesh.ulysses)
                in_fp8 = tuple(sum(not listed[head] for head in heads) for heads in shared)
                kinds.setdefault(in_fp8, (step, layer))
    return list(kinds.values())


def _block(spec: DiTSpec, config: EffectiveConfig, ranks: Ranks, attend: AttentionFn) -> WanDiT:
    """Returns an expert of one block, laid out as `builders` does. Its values are zeros, which do not matter."""
    sharded = config.ranks.dit_fsdp == "on"
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
