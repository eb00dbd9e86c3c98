"""The worker half of `wanfast generate`: reads job.json, makes each video, writes result.json.

All prompts are encoded first, so that UMT5 is gone before the experts come; models are loaded once for all jobs that
share them. A job that fails with a user's error is recorded and the rest still run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from wanfast.runtime import hardware, media_io, metadata, model_files, pixels
from wanfast.runtime.artifacts import JOB, RESULT, ArtifactStore, write_synced
from wanfast.runtime.atomic import atomic_paths
from wanfast.runtime.builders import build_expert, build_vae
from wanfast.runtime.config import EffectiveConfig, Expert, from_options
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.pipeline import ImageToVideoPipeline
from wanfast.runtime.plan import Plan
from wanfast.runtime.prompt_embeds import prompt_embeds
from wanfast.runtime.sampling.denoise import Branch, StepFn
from wanfast.runtime.timing import Stopwatch

Result = dict[str, Any]  # metadata's document, or {"error", "exit_code"}
OnResult = Callable[[int, Result], None]


def run(run_folder: Path, *, progress: bool, on_result: OnResult = lambda index, result: None) -> list[Result]:
    """Results of the jobs of `run_folder`/job.json, in order; each is told, and put into result.json, as it comes."""
    jobs = json.loads((run_folder / JOB).read_text(encoding="utf-8"))["jobs"]
    results: dict[int, Result] = {}
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(_models_of(job), []).append(index)
    for indices in groups.values():
        for index, result in zip(indices, _run_group([jobs[i] for i in indices], progress), strict=True):
            results[index] = result
            text = json.dumps([results.get(i) for i in range(len(jobs))], indent=2, ensure_ascii=False)
            write_synced(run_folder / RESULT, text + "\n")
            on_result(index, result)
    return [results[index] for index in range(len(jobs))]


def _models_of(job: dict[str, Any]) -> tuple[str, ...]:
    """Jobs with the same answer share loaded models."""
    return tuple(job["effective"][key] for key in ("model", "precision", "device", "artifacts_dir"))


def _run_group(jobs: list[dict[str, Any]], progress: bool) -> Iterator[Result]:
    configs = [from_options(EffectiveConfig, job["effective"]) for job in jobs]
    first = configs[0]
    watch = Stopwatch(first.device)
    try:
        hardware.prepare(first.device, first.precision)
        files = model_files.locate(first.model, first.artifacts_dir)
        with watch.span("text"):
            texts = [text for config in configs for text in (config.prompt, config.negative_prompt)]
            store = ArtifactStore(Path(first.artifacts_dir))
            embeds = prompt_embeds(texts, files, store, first.precision, first.device)
        with watch.span("load"):
            pipeline = load_pipeline(files, first)
    except WanFastError as error:
        yield from [failure(error)] * len(jobs)
        return
    except torch.OutOfMemoryError:
        message = f"--model {first.model} --precision {first.precision}: the weights do not fit into this GPU's memory"
        yield from [failure(ConfigError(f"{message}: take a larger GPU"))] * len(jobs)
        return
    for job, config in zip(jobs, configs, strict=True):
        text: dict[Branch, torch.Tensor] = {
            "prompt": embeds[config.prompt],
            "negative_prompt": embeds[config.negative_prompt],
        }
        try:
            yield _run_one(job, config, pipeline, files, text, watch, progress)
        except WanFastError as error:
            yield failure(error)
        except torch.OutOfMemoryError:
            size = f"--size {config.size} --frames {config.frames}"
            yield failure(ConfigError(f"{size}: does not fit into this GPU's memory beside the weights: take less"))
        watch = Stopwatch(first.device)  # loading counts for the first video alone


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
) -> Result:
    image = media_io.load_image(config.image)
    if image.sha256 != config.image_sha256:
        raise ConfigError(f"--image {config.image} changed since the plan was made: start again")
    plan = Plan.of(config, pipeline.spec, image.size, tuple(job["notes"]))
    g = plan.geometry
    hardware.reset_peak_memory(config.device)
    with _progress(plan, progress) as on_step:
        video = pipeline(plan, pixels.fit_image(image.pixels, g.width, g.height), text, watch, on_step)
    with atomic_paths(*plan.outputs, overwrite=config.overwrite) as (mp4, sidecar, *sheet):
        with watch.span("write"):
            frames = pixels.to_uint8(video)
            media_io.write_mp4(frames, mp4, config.fps)
            for path in sheet:
                media_io.write_contact_sheet(frames, path)
        watch.seconds["total"] = sum(watch.seconds.values())
        document = metadata.planned(plan, job["requested"]) | {
            "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
            "output_sha256": hashlib.sha256(mp4.read_bytes()).hexdigest(),
            "peak_memory_bytes": hardware.peak_memory_bytes(config.device),
            "hardware": hardware.describe(config.device),
            "weights": files.fingerprints,
        }
        write_synced(sidecar, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return document


@contextmanager
def _progress(plan: Plan, enabled: bool) -> Iterator[StepFn]:
    """A bar of the steps with the expert, seconds a step and time left, on stderr; it stays when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        num_steps = len(plan.schedule)
        task = bar.add_task("encoding the image", total=num_steps)
        started = time.perf_counter()  # of the first step, once it is known; rich forgets paces over 30 s

        def on_step(done: int, expert: Expert) -> None:
            nonlocal started
            now = time.perf_counter()
            started = started if done else now
            pace = (now - started) / max(done, 1)
            known = f", {pace:.2f} s/step, {_clock(pace * (num_steps - done))} left" if done else ""
            bar.update(task, completed=done, description=f"{expert.replace('_', ' ')}{known}")

        yield on_step


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
