"""The worker half of `wanfast generate`: reads job.json, makes each video, writes result.json.

All prompts are encoded first, so that UMT5 is gone before the experts come; models are loaded once for all jobs that
share them. A job that fails with a user's error is recorded and the rest still run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wanfast.runtime import hardware, media_io, metadata, model_files, pixels
from wanfast.runtime.artifacts import ArtifactStore, write_synced
from wanfast.runtime.atomic import atomic_path
from wanfast.runtime.builders import build_expert, build_vae
from wanfast.runtime.config import EffectiveConfig, from_options
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.pipeline import ImageToVideoPipeline
from wanfast.runtime.plan import Plan
from wanfast.runtime.prompt_embeds import prompt_embeds
from wanfast.runtime.sampling.denoise import Branch, Expert, StepFn
from wanfast.runtime.timing import Stopwatch

JOB, RESULT = "job.json", "result.json"


def run(run_folder: Path, *, progress: bool) -> list[dict[str, Any]]:
    """One result document or {"error", "exit_code"} per job of `run_folder`/job.json, in order; also in result.json."""
    jobs = json.loads((run_folder / JOB).read_text(encoding="utf-8"))["jobs"]
    results: list[dict[str, Any]] = []
    for _, group in itertools.groupby(jobs, key=_models_of):
        results += _run_group(list(group), progress)
    write_synced(run_folder / RESULT, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _models_of(job: dict[str, Any]) -> tuple[str, ...]:
    """Jobs with the same answer share loaded models."""
    return tuple(job["effective"][key] for key in ("model", "precision", "device", "artifacts_dir"))


def _run_group(jobs: list[dict[str, Any]], progress: bool) -> list[dict[str, Any]]:
    configs = [from_options(EffectiveConfig, job["effective"]) for job in jobs]
    first = configs[0]
    watch = Stopwatch(first.device)
    try:
        hardware.require(first.device)
        files = model_files.locate(first.model, first.artifacts_dir)
        with watch.span("text"):
            texts = [text for config in configs for text in (config.prompt, config.negative_prompt)]
            store = ArtifactStore(Path(first.artifacts_dir))
            embeds = prompt_embeds(texts, files, store, first.precision, first.device)
        with watch.span("load"):
            pipeline = load_pipeline(files, first)
    except WanFastError as error:
        return [failure(error)] * len(jobs)
    results = []
    for job, config in zip(jobs, configs, strict=True):
        text: dict[Branch, torch.Tensor] = {
            "prompt": embeds[config.prompt],
            "negative_prompt": embeds[config.negative_prompt],
        }
        try:
            results.append(_run_one(job, config, pipeline, files, text, watch, progress))
        except WanFastError as error:
            results.append(failure(error))
        except torch.OutOfMemoryError:
            results.append(
                failure(ConfigError(f"--size {config.size} --frames {config.frames}: out of GPU memory; take less"))
            )
        watch = Stopwatch(first.device)  # loading counts for the first video alone
    return results


def load_pipeline(files: ModelFiles, config: EffectiveConfig) -> ImageToVideoPipeline:
    """Both experts and the VAE, on the device."""
    experts: dict[Expert, Any] = {
        "high_noise": build_expert(files, "high_noise", config.precision, config.device),
        "low_noise": build_expert(files, "low_noise", config.precision, config.device),
    }
    return ImageToVideoPipeline(files.spec, experts, build_vae(files, config.device), config.device)


def _run_one(
    job: dict[str, Any],
    config: EffectiveConfig,
    pipeline: ImageToVideoPipeline,
    files: ModelFiles,
    text: dict[Branch, torch.Tensor],
    watch: Stopwatch,
    progress: bool,
) -> dict[str, Any]:
    image = media_io.load_image(config.image)
    if image.sha256 != config.image_sha256:
        raise ConfigError(f"--image {config.image} changed since the plan was made: start again")
    plan = Plan.of(config, pipeline.spec, image.size, tuple(job["notes"]))
    g = plan.geometry
    with _progress(plan, progress) as on_step:
        video = pipeline(plan, pixels.fit_image(image.pixels, g.width, g.height), text, watch, on_step)
    output, sidecar, *sheet = plan.outputs
    with watch.span("write"):
        frames = pixels.to_uint8(video)
        media_io.write_mp4(frames, output, config.fps)
        for path in sheet:
            media_io.write_contact_sheet(frames, path)
    watch.seconds["total"] = sum(watch.seconds.values())
    document = metadata.planned(plan, job["requested"]) | {
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "peak_memory_bytes": hardware.peak_memory_bytes(config.device),
        "hardware": hardware.describe(config.device),
        "weights": files.fingerprints,
    }
    with atomic_path(sidecar) as partial:
        write_synced(partial, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return document


@contextmanager
def _progress(plan: Plan, enabled: bool) -> Iterator[StepFn]:
    """A bar of the steps, with the expert, seconds a step and time left, on stderr; it stays when it is done."""
    columns = (
        TextColumn("denoise"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[expert]}"),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task("denoise", total=len(plan.schedule), expert="", pace="")

        def on_step(index: int, expert: Expert) -> None:
            bar.advance(task)
            speed = bar.tasks[task].speed
            bar.update(task, expert=expert.replace("_", " "), pace=f"{1 / speed:.2f} s/step" if speed else "")

        yield on_step
