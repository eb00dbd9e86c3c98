"""Measures every quality figure of the tiny model by one command: `make tiny-quality`.

Pairs of image and prompt go through the pipeline that `wanfast generate` runs. Their combinations of shape, colour and
motion are held out of training. Each video is compared with the true clip, and the tracker classifies its motion. Runs
with an empty prompt are a control: without the prompt the motion is right only by chance. The VAE is measured on the
true clips. The command writes JSON and a plot of the residuals' magnitude ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from wanfast.magcache_calib.recorder import Recorder
from wanfast.quality import metrics
from wanfast.quality.motions import MOTIONS
from wanfast.quality.tracking import classify
from wanfast.quality.world import FRAMES, SIZE, Renderer, Scene, draw_scene, moments_of_clip
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine.pipeline import ImageToVideoPipeline
from wanfast.runtime.engine.session import load_models
from wanfast.runtime.facts.choices import Branch, Scheme
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.magcache import StepCache
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_umt5

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Task:
    """Names one held-out pair of image and prompt, and whether the model gets the prompt."""

    index: int
    with_prompt: bool


@dataclass(frozen=True)
class Settings:
    """Holds the settings that all videos share."""

    model: str
    steps: int
    guidance: float
    precision: str
    quantize: Scheme | None = None  # if set, each video is also compared with the unquantized model's


class Judge:
    """Loads the models once in a process; a call makes the video of a task and returns its metrics."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self.files = model_files.locate(settings.model, "artifacts")
        spec = self.files.spec
        given = {
            "model": settings.model,
            "image": "none",
            "prompt": "none",
            "steps": settings.steps,
            "guidance_high_noise": settings.guidance,
            "guidance_low_noise": settings.guidance,
            "precision": "bf16" if settings.precision == "bf16" else "fp32",
            "device": "cpu",
            "cfg_parallel": 1,
            "ulysses": 1,
            "quantize": settings.quantize,
            "quantize_on_the_fly": settings.quantize is not None,
        }
        self.config = EffectiveConfig.of(given, spec)
        self.pipeline = self.load(self.config)
        unquantized = self.config.replace(quantize=None, quantize_on_the_fly=False)
        self.unquantized = self.load(unquantized) if settings.quantize else None
        self.umt5 = build_umt5(self.files, self.config.models.precision, Ranks("cpu"))
        self.tokenizer = PromptTokenizer(self.files.tokenizer, spec.dit.text_len)
        self.renderer = Renderer("cpu")

    def load(self, config: EffectiveConfig) -> ImageToVideoPipeline:
        return load_models(self.files, config, Ranks("cpu"), Stopwatch("cpu"))

    @torch.inference_mode()
    def __call__(self, task: Task) -> dict[str, Any]:
        scene, truth = self.held_out(task.index)
        video, ratios = self.video(self.pipeline, task, scene, truth[:, 0])
        verdict = classify(pixels.to_uint8(video), scene.rgb)
        result: dict[str, Any] = {
            "index": task.index,
            "with_prompt": task.with_prompt,
            "caption": scene.caption,
            "asked": scene.motion,
            "shown": verdict.motion,
            "first_frame_psnr": metrics.psnr(video[:, :1], truth[:, :1]),
            "psnr": metrics.psnr(video, truth),
            "ssim": metrics.ssim(video, truth),
            "ms_ssim": metrics.ms_ssim(video, truth),
            "flicker": metrics.flicker(video),
            "motion": metrics.motion(video),
            "ratios": ratios,
        }
        if task.with_prompt:
            vae = self.pipeline.vae
            result["true_flicker"], result["true_motion"] = metrics.flicker(truth), metrics.motion(truth)
            result["vae_psnr"] = metrics.psnr(vae.decode(vae.encode(truth.unsqueeze(0)))[0], truth)
        if self.unquantized:
            other, _ = self.video(self.unquantized, task, scene, truth[:, 0])
            result["psnr_unquantized"], result["ssim_unquantized"] = (
                metrics.psnr(video, other),
                metrics.ssim(video, other),
            )
        return result

    def held_out(self, index: int) -> tuple[Scene, Tensor]:
        """Returns a held-out scene and its true clip [3, F, H, W] in [-1, 1], rounded to 8 bits as an image file is."""
        scene = draw_scene(index, held_out=True, camera_share=0.0)
        clip = self.renderer([scene], moments_of_clip(FRAMES))[0]
        return scene, torch.round((clip + 1) / 2 * 255) / 255 * 2 - 1

    def video(
        self, pipeline: ImageToVideoPipeline, task: Task, scene: Scene, image: Tensor
    ) -> tuple[Tensor, list[list[float]]]:
        config = self.config.replace(seed=task.index)
        if not task.with_prompt:
            config = config.replace(guidance_high_noise=1.0, guidance_low_noise=1.0)
        plan = Plan.of(config, self.files.spec, (SIZE, SIZE))
        recorder = Recorder(Ranks("cpu"), plan.geometry.tokens)
        video = self.by_plan(pipeline, plan, scene.caption if task.with_prompt else "", image, recorder)
        measured = [of_step["prompt"] for of_step in recorder.measured(len(plan.schedule))]
        ratios = [
            [float(step.timestep), found["ratio"] if found else 1.0]
            for step, found in zip(plan.schedule, measured, strict=True)
        ]
        return video, ratios

    def by_plan(
        self,
        pipeline: ImageToVideoPipeline,
        plan: Plan,
        prompt: str,
        image: Tensor,
        residuals: StepCache | None = None,
    ) -> Tensor:
        text: dict[Branch, Tensor] = {
            "prompt": self.embed(prompt),
            "negative_prompt": self.embed(self.files.spec.negative_prompt),
        }
        video = pipeline(plan, image, text, Stopwatch("cpu"), residuals=residuals)
        assert video is not None
        return video

    def embed(self, text: str) -> Tensor:
        embeds: Tensor = self.umt5(torch.tensor([self.tokenizer.encode(text).ids]))[0]
        return embeds


_judge: Judge | None = None


def _start(settings: Settings) -> None:
    global _judge
    _judge = Judge(settings)


def _work(asked: tuple[Callable[[Judge, T], R], T]) -> R:
    judged, task = asked
    assert _judge is not None
    return judged(_judge, task)


def judge_all(
    judged: Callable[[Judge, T], R], tasks: Sequence[T], settings: Settings, processes: int, *, every: int
) -> list[R]:
    """Returns `judged(judge, task)` for each task, in order; several processes compute, each with a judge.

    Progress is printed each time `every` more tasks are done.
    """
    started, results = time.perf_counter(), []
    with multiprocessing.get_context("spawn").Pool(processes, _start, (settings,)) as pool:
        for result in pool.imap(_work, [(judged, task) for task in tasks]):
            results.append(result)
            if len(results) % every == 0:
                print(f"{len(results)} of {len(tasks)}, {time.perf_counter() - started:.0f} s", flush=True)
    return results


def share_right(asked: list[str], shown: list[str | None]) -> dict[str, Any]:
    """Returns how many of all videos show the requested motion, as number and share, with the 95 % interval."""
    right = sum(a == s for a, s in zip(asked, shown, strict=True))
    low, high = wilson(right, len(asked))
    return {"right": right, "of": len(asked), "share": right / len(asked), "95%": [round(low, 3), round(high, 3)]}


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the confidence interval (low, high) of successes / trials (Wilson 1927); the default z gives 95 %."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(results: list[dict[str, Any]], settings: Settings, seconds: float) -> dict[str, Any]:
    prompted = [r for r in results if r["with_prompt"]]
    empty = [r for r in results if not r["with_prompt"]]

    def mean(name: str, rows: list[dict[str, Any]]) -> float:
        return round(float(np.mean([row[name] for row in rows])), 3)

    def following(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return share_right([row["asked"] for row in rows], [row["shown"] for row in rows])

    by_motion = {name: [row for row in prompted if row["asked"] == name] for name in MOTIONS}

    names = (
        "vae_psnr",
        "first_frame_psnr",
        "psnr",
        "ssim",
        "ms_ssim",
        "flicker",
        "motion",
        "true_flicker",
        "true_motion",
        *(("psnr_unquantized", "ssim_unquantized") if settings.quantize else ()),
    )
    ratios = np.mean([row["ratios"] for row in prompted], axis=0)
    return {
        "settings": vars(settings),
        **{name: mean(name, prompted) for name in names},
        "prompt_following": following(prompted),
        "by_motion": {name: [following(rows)["right"], len(rows)] for name, rows in by_motion.items() if rows},
        "empty_prompt": following(empty) if empty else None,
        "empty_prompt_shown": dict(Counter(str(row["shown"]) for row in empty).most_common()),
        "chance": 1 / len(MOTIONS),
        "residual_ratios": [[timestep, round(ratio, 5)] for timestep, ratio in ratios.tolist()],
        "missed": [
            {key: row[key] for key in ("index", "caption", "asked", "shown")}
            for row in prompted
            if row["asked"] != row["shown"]
        ],
        "seconds": round(seconds, 1),
        "commit": commit(),
        "versions": versions(),
    }


def plot(summary: dict[str, Any], boundary: float, file: Path) -> None:
    """Plots the residuals' magnitude ratio over the steps, with one line for each expert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = np.array(summary["residual_ratios"])[1:]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for name, chosen in (
        ("high-noise expert", points[:, 0] >= boundary * 1000),
        ("low-noise expert", points[:, 0] < boundary * 1000),
    ):
        axes.plot(np.flatnonzero(chosen) + 1, points[chosen, 1], marker=".", label=name)
    axes.set(xlabel="step", ylabel="residual norm / that of the step before", title="tiny: residual magnitude ratios")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None, help="for both experts; the model's own by default")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quantize", choices=get_args(Scheme), help="quantize the experts by this scheme")
    parser.add_argument("--empty", type=int, default=50, help="pairs that also run with an empty prompt")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the plot is written beside it")
    options = parser.parse_args()
    if options.output is not None and find_spec("matplotlib") is None:
        parser.error("--output draws a plot, which needs matplotlib: pip install 'wanfast[quality]', or omit --output")
    spec = model_files.locate(options.model, "artifacts").spec
    guidance = spec.guidance_high_noise if options.guidance is None else options.guidance
    settings = Settings(options.model, options.steps or spec.steps, guidance, options.precision, options.quantize)
    tasks = [Task(index, with_prompt=True) for index in range(options.pairs)]
    tasks += [Task(index, with_prompt=False) for index in range(min(options.empty, options.pairs))]
    started = time.perf_counter()
    results = judge_all(Judge.__call__, tasks, settings, options.processes, every=20)
    summary = summarise(results, settings, time.perf_counter() - started)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(summary, indent=1) + "\n")
        plot(summary, spec.boundary, options.output.with_suffix(".png"))
    print(json.dumps({key: value for key, value in summary.items() if key not in ("residual_ratios", "missed")}))


if __name__ == "__main__":
    main()
