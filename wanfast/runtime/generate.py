"""The worker half of `wanfast generate`: reads job.json, makes each video, leaves a result for each.

All prompts are encoded first, so that UMT5 is gone before the experts come; models are loaded once for all jobs that
share them. A job that fails with a user's error is recorded and the rest still run. Every rank of a group runs this,
in step; the leader alone writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanfast.runtime import attention_probe, hardware, media_io, metadata, model_files, pixels
from wanfast.runtime.artifacts import ArtifactStore, write_synced
from wanfast.runtime.atomic import atomic_paths
from wanfast.runtime.builders import DTYPES, build_expert, build_vae
from wanfast.runtime.compilation import (
    cache_inputs,
    compile_blocks,
    compiled_anew,
    compiler_imported_meanwhile,
    load_caches,
)
from wanfast.runtime.config import Branch, EffectiveConfig, Expert, from_options
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError, WanFastError, failure
from wanfast.runtime.experts import Experts, OffloadedExperts, ResidentExperts
from wanfast.runtime.magcache_curves import curve_of
from wanfast.runtime.media_io import LoadedImage
from wanfast.runtime.model_files import COMPONENTS, Component, ModelFiles
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.pipeline import ImageToVideoPipeline
from wanfast.runtime.plan import Plan
from wanfast.runtime.prompt_embeds import prompt_embeds
from wanfast.runtime.quantized_artifacts import EXPERTS, quantized_expert, shards
from wanfast.runtime.timing import FirstStep, Stopwatch

Job = dict[str, Any]  # of requests.Planned.job
Result = dict[str, Any]  # metadata's document, or {"error", "exit_code"}
ProgressFn = Callable[[int, str, int, int], None]  # (job, what is at work, steps done, of all steps)


@dataclass(frozen=True)
class Loaded:
    """The models that jobs share, and where they came from."""

    pipeline: ImageToVideoPipeline
    files: ModelFiles
    quantized: dict[str, str]  # keys of the experts' artifacts
    loading: dict[str, dict[str, float]]  # seconds and bytes of each component; counted for the first job alone


# (index, job, models, embeddings of both branches, seconds so far, progress) -> what came of it
MakeFn = Callable[[int, Job, Loaded, dict[Branch, torch.Tensor], Stopwatch, ProgressFn], Result]


def run(
    jobs: list[Job],
    ranks: Ranks,
    *,
    claim: Callable[[int], bool] | None = None,
    progress: ProgressFn = lambda index, stage, done, total: None,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of each job as it comes; nothing of a job that `claim` refuses, as another group makes it."""
    yield from run_with(make_video, jobs, ranks, claim, progress)


def run_with(
    make: MakeFn, jobs: list[Job], ranks: Ranks, claim: Callable[[int], bool] | None, progress: ProgressFn
) -> Iterator[tuple[int, Result]]:
    """The same, of jobs that want these models for something else than a video."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(_models_of(job), []).append(index)
    for indices in groups.values():
        yield from _run_group(make, {index: jobs[index] for index in indices}, ranks, claim, progress)


_OF_MODELS = (
    "model",
    "precision",
    "quantize",
    "quantize_on_the_fly",
    "attention",
    "tf32",
    "compile",
    "compile_mode",
    "artifacts_dir",
)


def _models_of(job: Job) -> tuple[Any, ...]:
    """Jobs with the same answer share loaded models."""
    return tuple(job["effective"][name] for name in _OF_MODELS)


def _run_group(
    make: MakeFn, jobs: dict[int, Job], ranks: Ranks, claim: Callable[[int], bool] | None, progress: ProgressFn
) -> Iterator[tuple[int, Result]]:
    configs = {index: from_options(EffectiveConfig, job["effective"]) for index, job in jobs.items()}
    claimed = (index for index in configs if claim is None or claim(index))
    index = next(claimed, None)
    if index is None:
        return
    first, watch, loads = configs[index], Stopwatch(ranks.device), Stopwatch(ranks.device)
    progress(index, "loading the models", 0, 0)
    hardware.forget_cuda_graphs()  # of the group before, which keep its memory
    hardware.free_memory(ranks.device)
    try:
        ranks.together(lambda: hardware.prepare(first.device, first.precision, first.tf32))
        files = ranks.together(lambda: model_files.locate(first.model, first.artifacts_dir))
        hardware.use_few_threads(ranks.device, files.spec.dit.dim)
        with watch.span("text"):
            texts = [text for config in configs.values() for text in (config.prompt, config.negative_prompt)]
            embeds = prompt_embeds(texts, files, first, ranks, loads)
        with watch.span("load"):
            pipeline = load_pipeline(files, first, ranks, loads)
    except (WanFastError, torch.OutOfMemoryError) as error:
        message = f"--model {first.model} --precision {first.precision}: the weights do not fit into this GPU's memory"
        if claim is not None and not isinstance(error, MissingArtifactError | CorruptArtifactError):
            raise  # other rank groups may fare better: they take the rest
        document = _failure(error, ranks, f"{message}: take a larger GPU, several of them, or --expert-offload on")
        yield from ((failed, document) for failed in (index, *claimed))
        return
    kept = _kept_experts(files, first)
    quantized = {expert: folder.name for expert, folder in kept.items()}
    loaded = Loaded(pipeline, files, quantized, _speeds(loads, files, kept))
    while index is not None:
        config = configs[index]
        text: dict[Branch, torch.Tensor] = {
            "prompt": embeds[config.prompt],
            "negative_prompt": embeds[config.negative_prompt],
        }
        try:
            yield index, make(index, jobs[index], loaded, text, watch, progress)
        except (WanFastError, torch.OutOfMemoryError) as error:
            message = f"--size {config.size} --frames {config.frames}: does not fit into this GPU's memory beside the"
            yield index, _failure(error, ranks, f"{message} weights: take less")
        watch, loaded = Stopwatch(ranks.device), dataclasses.replace(loaded, loading={})
        index = next(claimed, None)


def _failure(error: Exception, ranks: Ranks, out_of_memory: str) -> Result:
    """The result of a job that failed; what only one rank met ends its group, since the peers wait in an exchange."""
    if ranks.size > 1 and not (isinstance(error, WanFastError) and error.is_agreed):
        raise error
    if isinstance(error, WanFastError):
        return failure(error)
    return failure(ConfigError(out_of_memory))


def load_pipeline(files: ModelFiles, config: EffectiveConfig, ranks: Ranks, loads: Stopwatch) -> ImageToVideoPipeline:
    """Both experts, and the leader's VAE, where `config` wants them; seconds of each in `loads`."""
    hosted = "cpu" if config.expert_offload == "on" else None
    choice = attention_probe.agree(config.attention, ranks, DTYPES[config.precision], files.spec.dit.head_dim)
    attend = attention_by(choice.kernel)

    def build(expert: Expert) -> WanDiT:
        with loads.span(expert):
            return build_expert(
                files,
                expert,
                config.precision,
                ranks,
                attend=attend,
                quantized=quantized_expert(files, config, expert),
                on_the_fly=config.quantize_on_the_fly,
                sharded=config.dit_fsdp == "on",
                device=hosted,
            )

    with compiler_imported_meanwhile(config):
        models: dict[Expert, WanDiT] = {"high_noise": build("high_noise"), "low_noise": build("low_noise")}
        may_move = config.compile_mode != "max-autotune" or ranks.size == 1
        experts: Experts = (
            OffloadedExperts(models, ranks.device)
            if hosted
            else ResidentExperts(models, ranks.device, may_move=may_move)
        )
        with loads.span("vae"):
            vae = ranks.together(lambda: build_vae(files, ranks.device) if ranks.is_leader else None)
    if config.compile:
        for model in models.values():
            compile_blocks(model, config.compile_mode)
    return ImageToVideoPipeline(files.spec, experts, vae, ranks, choice)


def _kept_experts(files: ModelFiles, config: EffectiveConfig) -> dict[str, Path]:
    """The artifacts that the experts came from, if they did."""
    if config.quantize_on_the_fly:
        return {}
    return {name: expert.require() for name in EXPERTS if (expert := quantized_expert(files, config, name))}


def _speeds(loads: Stopwatch, files: ModelFiles, kept: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each component that was loaded: the rank group reads them about once."""

    def sources(component: Component) -> list[Path]:
        return shards(kept[component]) if component in kept else files.weights(component)

    return {
        component: {
            "seconds": round(loads.seconds[component], 3),
            "bytes": sum(file.stat().st_size for file in sources(component)),
        }
        for component in COMPONENTS
        if component in loads.seconds
    }


def planned(job: Job, loaded: Loaded) -> tuple[Plan, torch.Tensor]:
    """(what runs, the image [3, H, W] in its shape), on every rank."""
    pipeline, ranks = loaded.pipeline, loaded.pipeline.ranks
    config = from_options(EffectiveConfig, job["effective"])
    image = ranks.lead(lambda: _read_image(config))
    config = dataclasses.replace(config, attention=pipeline.attention.kernel)  # and is to run again
    curve = ranks.lead(lambda: curve_of(config, loaded.files))  # machines could hold different ones of one key
    plan = Plan.of(config, pipeline.spec, image.size, tuple(job["notes"]), job["placement"], curve)
    return plan, pixels.fit_image(image.pixels, plan.geometry.width, plan.geometry.height)


def make_video(
    index: int,
    job: Job,
    loaded: Loaded,
    text: dict[Branch, torch.Tensor],
    watch: Stopwatch,
    progress: ProgressFn,
) -> Result:
    """One video and its JSON, written by the leader."""
    pipeline, ranks = loaded.pipeline, loaded.pipeline.ranks
    plan, image = planned(job, loaded)
    config, steps = plan.config, len(plan.schedule)
    compile_cache, compiled = (_warm_start(plan, ranks), compiled_anew()) if config.compile else (None, 0)
    hardware.reset_peak_memory(config.device)
    progress(index, "encoding the image", 0, steps)
    first_step = FirstStep(ranks.device)

    def on_step(done: int, expert: Expert) -> None:
        first_step(done)
        progress(index, expert.replace("_", " "), done, steps)

    video = pipeline(plan, image, text, watch, on_step)
    peaks = ranks.gather(hardware.peak_memory_bytes(config.device))
    anew = max(ranks.gather(compiled_anew() - compiled if config.compile else 0))

    def write() -> Result:
        assert video is not None
        with atomic_paths(*plan.outputs, overwrite=config.overwrite) as (mp4, sidecar, *sheet):
            with watch.span("write"):
                frames = pixels.to_uint8(video)
                media_io.write_mp4(frames, mp4, config.fps)
                for path in sheet:
                    media_io.write_contact_sheet(frames, path)
            watch.seconds["total"] = sum(watch.seconds.values())
            document = metadata.planned(plan, job["requested"]) | {
                "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
                "first_step_s": round(first_step.seconds, 3),
                "attention": dataclasses.asdict(pipeline.attention),
                "compile_cache": compile_cache,
                "compiled_anew": anew,
                "loading": loaded.loading,
                "output_sha256": hashlib.sha256(mp4.read_bytes()).hexdigest(),
                "peak_memory_bytes": max(peaks),
                "peak_memory_bytes_by_rank": peaks,
                "hardware": hardware.describe(config.device),
                "weights": loaded.files.fingerprints,
                "quantized": loaded.quantized,
            }
            write_synced(sidecar, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return document

    return ranks.lead(write)


def _warm_start(plan: Plan, ranks: Ranks) -> str | None:
    """The key of the caches that `wanfast warmup` left for this plan, now loaded; None if there are none."""
    inputs = cache_inputs(plan.config, plan.spec.dit, plan.geometry.tokens)
    return load_caches(ArtifactStore(Path(plan.config.artifacts_dir)), inputs, ranks)


def _read_image(config: EffectiveConfig) -> LoadedImage:
    image = media_io.load_image(config.image)
    if image.sha256 != config.image_sha256:
        raise ConfigError(f"--image {config.image} changed since the plan was made: start again")
    return image
