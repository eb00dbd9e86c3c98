"""Measures the quality of the tiny model's videos; `make tiny-quality` runs this module.

Each test is a pair of an image and a prompt: the first frame and the caption of a rendered clip. The pipeline of
`wanfast generate` makes a video of each pair, and the video is compared with the clip. The prompt asks for a motion of
a coloured shape. Training never combines this shape, this colour and this motion. With --photographs, there are also
pairs whose prompt asks for a motion of the camera over a photograph. Training never shows this photograph.
A test is passed if the video shows the requested motion. A tracker finds the motion of the shape, and an alignment of
the frames finds the motion of the camera.

Some pairs run again with an empty prompt. Then the motion can be right only by chance. Some pairs run again with the
clip's last frame as a second image. Then the results say how many videos end near that frame. The VAE alone is measured
on the rendered clips.
The command prints the results. With --output, it also writes them as a JSON file, and draws MagCache's ratios of
residual norms, step by step, as a PNG file.
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
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.magcache_calib.recorder import Recorder
from wanfast.quality import metrics, tracking
from wanfast.quality.camera import CAMERAS
from wanfast.quality.motions import MOTIONS
from wanfast.quality.photographs import Photographs
from wanfast.quality.world import FRAMES, SIZE, Renderer, Scene, camera_scene, draw_scene, moments_of_clip
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine.loading import load_models
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.facts.choices import Branch, Scheme
from wanfast.runtime.machine.packages import commit, install, versions
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.magcache import StepCache
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_umt5

T = TypeVar("T")
R = TypeVar("R")
Mover = Literal["shape", "camera"]  # what a prompt asks to move


@dataclass(frozen=True)
class Task:
    """Names a held-out pair of image and prompt, and says what the model gets besides the image.

    If `with_prompt` is false, the model gets an empty prompt. If `with_last` is true, the model also gets the last
    frame of the true clip.
    """

    index: int
    with_prompt: bool
    mover: Mover = "shape"
    with_last: bool = False


@dataclass(frozen=True)
class Settings:
    """Holds the settings that all videos share."""

    model: str
    steps: int
    guidance: float
    precision: str
    quantize: Scheme | None = None  # if set, each video is also compared with the unquantized model's
    side: int = SIZE  # pixels
    frames: int = FRAMES
    photographs: str | None = None  # the pack, for the camera's judge
    device: str = "cpu"


class Judge:
    """Loads the models once in a process; a call makes the video of a task and returns the video's metrics."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self.settings = settings
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
            "size": f"{settings.side}x{settings.side}",
            "frames": settings.frames,
            "device": settings.device,
            "cfg_parallel": 1,
            "ulysses": 1,
            "quantize": settings.quantize,
            "quantize_on_the_fly": settings.quantize is not None,
        }
        self.config = EffectiveConfig.of(given, spec)
        self.pipeline = self.load(self.config)
        unquantized = self.config.replace(quantize=None, quantize_on_the_fly=False)
        self.unquantized = self.load(unquantized) if settings.quantize else None
        self._pipelines = {self.config.models: self.pipeline}
        self.umt5 = build_umt5(self.files, self.config.models.precision, Ranks(settings.device))
        self.tokenizer = PromptTokenizer(self.files.tokenizer, spec.dit.text_len)
        pack = settings.photographs
        self.photographs = Photographs(Path(pack), settings.device, held_out=True) if pack else None
        self.renderer = Renderer(settings.device, self.photographs)

    def load(self, config: EffectiveConfig) -> VideoPipeline:
        return load_models(self.files, config, Ranks(self.settings.device), Stopwatch(self.settings.device))

    def pipeline_of(self, config: EffectiveConfig) -> VideoPipeline:
        """Returns a pipeline with the weights that a config names; each set of weights is loaded only once."""
        if config.models not in self._pipelines:
            self._pipelines[config.models] = self.load(config)
        return self._pipelines[config.models]

    def plan_of(self, config: EffectiveConfig) -> Plan:
        """Returns the plan of a video with `config`, from a square image of `settings.side` pixels a side."""
        side = self.settings.side
        return Plan.of(config, self.files.spec, (side, side))

    @torch.inference_mode()
    def __call__(self, task: Task) -> dict[str, Any]:
        scene, truth = self.held_out(task.index, task.mover)
        video, ratios = self.video(self.pipeline, task, scene, truth)
        result: dict[str, Any] = {
            **vars(task),
            "caption": scene.caption,
            "asked": asked(task.mover, scene),
            "shown": shown(task.mover, scene, pixels.to_uint8(video)),
            "first_frame_psnr": metrics.psnr(video[:, :1], truth[:, :1]),
            "psnr": metrics.psnr(video, truth),
            "ssim": metrics.ssim(video, truth),
            "ms_ssim": metrics.ms_ssim(video, truth),
            "flicker": metrics.flicker(video),
            "motion": metrics.motion(video),
            "ratios": ratios,
        }
        if task.with_last:
            result["last_frame_psnr"] = metrics.psnr(video[:, -1:], truth[:, -1:])
        if task.with_prompt:
            vae = self.pipeline.vae
            result["true_flicker"], result["true_motion"] = metrics.flicker(truth), metrics.motion(truth)
            given = truth.unsqueeze(0).to(self.settings.device)
            result["vae_psnr"] = metrics.psnr(vae.decode(vae.encode(given))[0].cpu(), truth)
        if self.unquantized:
            other, _ = self.video(self.unquantized, task, scene, truth)
            result["psnr_unquantized"], result["ssim_unquantized"] = (
                metrics.psnr(video, other),
                metrics.ssim(video, other),
            )
        return result

    def held_out(self, index: int, mover: Mover = "shape") -> tuple[Scene, Tensor]:
        """Returns the scene with number `index`, and the scene's true clip; training never shows this scene.

        `mover`: what moves in the scene, the shape or the camera. For "camera", `settings.photographs` must be set. The
        clip is [3, F, H, W] in [-1, 1], and its values are rounded to 8 bits.
        """
        size = (self.settings.side, self.settings.side)
        if mover == "shape":
            scene = draw_scene(index, held_out=True, camera_share=0.0)
        else:
            assert self.photographs is not None
            scene = camera_scene(index, self.photographs, size)
        clip = self.renderer([scene], moments_of_clip(self.settings.frames), size=size)[0].cpu()
        return scene, torch.round((clip + 1) / 2 * 255) / 255 * 2 - 1

    def video(
        self, pipeline: VideoPipeline, task: Task, scene: Scene, truth: Tensor
    ) -> tuple[Tensor, list[list[float]]]:
        config = self.config.replace(seed=task.index)
        if not task.with_prompt:
            config = config.replace(guidance_high_noise=1.0, guidance_low_noise=1.0)
        plan = self.plan_of(config)
        recorder = Recorder(Ranks(self.settings.device), plan.geometry.tokens)
        prompt = scene.caption if task.with_prompt else ""
        last = truth[:, -1] if task.with_last else None
        video = self.by_plan(pipeline, plan, prompt, truth[:, 0], recorder, last)
        measured = [of_step["prompt"] for of_step in recorder.measured(len(plan.schedule))]
        ratios = [
            [float(step.timestep), found["ratio"] if found else 1.0]
            for step, found in zip(plan.schedule, measured, strict=True)
        ]
        return video, ratios

    @torch.inference_mode()
    def by_plan(
        self,
        pipeline: VideoPipeline,
        plan: Plan,
        prompt: str,
        image: Tensor,
        residuals: StepCache | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Returns the video [3, F, H, W] in [-1, 1] that the pipeline makes by `plan` from `image` and `prompt`.

        `image` and `last`: the first and the last image of the video, [3, H, W] in [-1, 1]. If `last` is None, no last
        image is given. `residuals`: the cache that decides which forwards are skipped; None means the plan's own cache.
        """
        text: dict[Branch, Tensor] = {
            "prompt": self.embed(prompt),
            "negative_prompt": self.embed(self.files.spec.negative_prompt),
        }
        images = torch.stack([image] if last is None else [image, last])
        watch, cache = Stopwatch(self.settings.device), residuals or plan.residuals()
        latent = pipeline.latent(plan, images, text, watch, lambda done, expert: None, cache)
        return pipeline.vae.decode(latent)[0].cpu()

    def embed(self, text: str) -> Tensor:
        ids = torch.tensor([self.tokenizer.encode(text).ids], device=self.settings.device)
        embeds: Tensor = self.umt5(ids)[0]
        return embeds


def asked(mover: Mover, scene: Scene) -> str:
    """Returns the name of the motion that the scene's prompt asks for; `mover` says what moves."""
    name = scene.motion if mover == "shape" else scene.camera
    assert name is not None
    return name


def shown(mover: Mover, scene: Scene, frames: npt.NDArray[np.uint8]) -> str | None:
    """Returns the motion that the frames show; `mover` says what moves: the shape, or the camera.

    Returns None if the shape or the camera could not be followed.
    """
    if mover == "shape":
        return tracking.classify(frames, scene.rgb).motion
    from wanfast.quality import registration  # needs OpenCV, and only photographs need this module

    return registration.classify(frames).camera


_judge: Judge | None = None


def _start(settings: Settings, gpus: SimpleQueue[int]) -> None:
    global _judge
    if settings.device == "cuda":
        torch.cuda.set_device(gpus.get())
    _judge = Judge(settings)


def _work(asked: tuple[Callable[[Judge, T], R], T]) -> R:
    judged, task = asked
    assert _judge is not None
    return judged(_judge, task)


def judge_all(
    judged: Callable[[Judge, T], R], tasks: Sequence[T], settings: Settings, processes: int, *, every: int
) -> list[R]:
    """Returns `judged(judge, task)` for each task, in order.

    The tasks run in `processes` worker processes, and each process has its own judge. On GPUs, the processes share all
    GPUs of the machine. `every`: the number of finished tasks between two printed lines of progress.
    """
    started, results, context = time.perf_counter(), [], multiprocessing.get_context("spawn")
    gpus: SimpleQueue[int] = context.SimpleQueue()
    for process in range(processes):
        gpus.put(process % max(1, torch.cuda.device_count()))
    with context.Pool(processes, _start, (settings, gpus)) as pool:
        for result in pool.imap(_work, [(judged, task) for task in tasks]):
            results.append(result)
            if len(results) % every == 0:
                print(f"{len(results)} of {len(tasks)} tasks done in {time.perf_counter() - started:.0f} s", flush=True)
    return results


def share_right(asked: list[str], shown: list[str | None]) -> dict[str, Any]:
    """Returns how many videos show the requested motion: the number, the share, and the share's 95 % interval."""
    return share_of([a == s for a, s in zip(asked, shown, strict=True)])


def share_of(right: list[bool]) -> dict[str, Any]:
    """Returns how many of the results are right: the number, the share, and the share's 95 % confidence interval."""
    low, high = wilson(sum(right), len(right))
    return {
        "right": sum(right),
        "of": len(right),
        "share": sum(right) / len(right),
        "95%": [round(low, 3), round(high, 3)],
    }


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the confidence interval (low, high) of successes / trials (Wilson 1927); the default z gives 95 %."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean of the values and the mean's 95 % confidence interval, which is None for a single value.

    The interval uses a quantile of Student's t distribution. Fisher's expansion approximates this quantile; the error
    is below 2 % if there are at least five values (Abramowitz and Stegun 1964, 26.7.5).
    """
    z, freedom = 1.96, len(values) - 1
    interval, mean = None, float(np.mean(values))
    if freedom:
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        interval = [round(mean - half, 3), round(mean + half, 3)]
    return {"mean": round(mean, 3), "95%": interval, "of": len(values)}


_REACHED_DB = 25  # a video whose last frame is so near to the given one has reached it
_METRICS = (
    "vae_psnr",
    "first_frame_psnr",
    "psnr",
    "ssim",
    "ms_ssim",
    "flicker",
    "motion",
    "true_flicker",
    "true_motion",
)


def summarise(results: list[dict[str, Any]], settings: Settings, seconds: float) -> dict[str, Any]:
    """Returns the results as a JSON document, with mean qualities and the share of videos that show the right motion.

    The top level of the document holds the means and shares of the videos with a moving shape. If there are videos with
    a moving camera, the key "camera" holds their means and shares. `results`: what `Judge` returned for each video.
    `seconds`: how long all videos took; the document only records it.
    """
    shapes, cameras = ([row for row in results if row["mover"] == mover] for mover in ("shape", "camera"))
    ratios = np.mean([row["ratios"] for row in shapes if row["with_prompt"]], axis=0)
    return {
        "settings": vars(settings),
        **_figures(shapes, list(MOTIONS), settings),
        **({"camera": _figures(cameras, list(CAMERAS), settings)} if cameras else {}),
        "residual_ratios": [[timestep, round(ratio, 5)] for timestep, ratio in ratios.tolist()],
        "seconds": round(seconds, 1),
        "commit": commit(),
        "versions": versions(),
    }


def _figures(results: list[dict[str, Any]], motions: list[str], settings: Settings) -> dict[str, Any]:
    """Returns the figures of one kind of videos; `motions` are the motions from which its classifier chooses."""
    last = [r for r in results if r["with_last"]]
    prompted = [r for r in results if r["with_prompt"] and not r["with_last"]]
    empty = [r for r in results if not r["with_prompt"]]

    def mean(name: str, rows: list[dict[str, Any]]) -> float:
        return round(float(np.mean([row[name] for row in rows])), 3)

    def following(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return share_right([row["asked"] for row in rows], [row["shown"] for row in rows])

    by_motion = {name: [row for row in prompted if row["asked"] == name] for name in motions}
    quantized = ("psnr_unquantized", "ssim_unquantized") if settings.quantize else ()
    return {
        **{name: mean(name, prompted) for name in (*_METRICS, *quantized)},
        "prompt_following": following(prompted),
        "by_motion": {name: [following(rows)["right"], len(rows)] for name, rows in by_motion.items() if rows},
        "empty_prompt": following(empty) if empty else None,
        "empty_prompt_shown": dict(Counter(str(row["shown"]) for row in empty).most_common()),
        "chance": 1 / len(motions),
        **(
            {**figures_of_last([row["last_frame_psnr"] for row in last]), "last_frame_given": following(last)}
            if last
            else {}
        ),
        "missed": [
            {key: row[key] for key in ("index", "caption", "asked", "shown")}
            for row in prompted
            if row["asked"] != row["shown"]
        ],
    }


def figures_of_last(psnrs: list[float]) -> dict[str, Any]:
    """Returns how near videos came to their given last frames: the mean PSNR, the least PSNR, and how many came near.

    `psnrs` has one value for each video: the PSNR in dB of the video's last frame, compared with the given last frame.
    A video came near if its PSNR is 25 or more.
    """
    return {
        "last_frame_psnr": round(float(np.mean(psnrs)), 3),
        "last_frame_psnr_least": round(min(psnrs), 3),
        "last_frame_reached": share_of([psnr >= _REACHED_DB for psnr in psnrs]),
    }


def plot(summary: dict[str, Any], boundary: float, file: Path) -> None:
    """Plots each step's residual norm divided by the norm of the step before, and saves the plot as `file`.

    `summary`: the result of `summarise`. `boundary`: the lowest noise level, 0 to 1, of the high-noise expert. The plot
    has one colour for each expert.
    """
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
    axes.set(
        xlabel="step",
        ylabel="residual norm / that of the step before",
        title="tiny: residual magnitude ratios",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def tasks_of(pairs: int, empty: int, last: int, movers: tuple[Mover, ...]) -> list[Task]:
    tasks = []
    for mover in movers:
        tasks += [Task(index, True, mover) for index in range(pairs)]
        tasks += [Task(index, False, mover) for index in range(min(empty, pairs))]
        tasks += [Task(index, True, mover, with_last=True) for index in range(min(last, pairs))]
    return tasks


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the command line; `settings_of` makes the settings of all videos from the parsed options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="guidance scale of both experts; by default, both use the model's scale for the high-noise expert",
    )
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quantize", choices=get_args(Scheme), help="quantize the experts by this scheme")
    parser.add_argument(
        "--photographs",
        help="zip file that `python -m training.photographs` wrote; without it, all scenes are of shapes",
    )
    parser.add_argument("--side", type=int, default=SIZE, help="width and height of the videos in pixels")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    return parser


def settings_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """Returns the settings that the options give.

    Ends the process with an error if --photographs is given, but OpenCV is missing.
    """
    if options.photographs and find_spec("cv2") is None:
        parser.error(f"--photographs needs OpenCV: {install('quality')}, or omit --photographs")
    spec = model_files.locate(options.model, "artifacts").spec
    return Settings(
        options.model,
        options.steps or spec.steps,
        spec.guidance_high_noise if options.guidance is None else options.guidance,
        options.precision,
        options.quantize,
        options.side,
        options.frames,
        options.photographs,
        options.device,
    )


def require_plotting(parser: argparse.ArgumentParser, output: Path | None) -> None:
    """Ends the process with an error if `output` is given, but matplotlib is missing.

    If `output` is None, no plot is drawn, and matplotlib is not needed.
    """
    if output is not None and find_spec("matplotlib") is None:
        parser.error(f"--output draws a plot, which needs matplotlib: {install('plots')}, or omit --output")


def write(document: dict[str, Any], output: Path) -> None:
    """Writes a JSON document, and makes the folder of the file if it is missing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")


def movers_of(settings: Settings) -> tuple[Mover, ...]:
    """Returns what may move in the clips: the shape, and also the camera if there are photographs."""
    return ("shape", "camera") if settings.photographs else ("shape",)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--pairs",
        type=int,
        default=100,
        help="number of pairs of an image and a prompt; the model makes a video from each pair",
    )
    parser.add_argument(
        "--empty",
        type=int,
        default=25,
        help="for how many of the pairs the model makes a second video, with an empty prompt",
    )
    parser.add_argument(
        "--last",
        type=int,
        default=25,
        help="for how many of the pairs the model makes another video, with the clip's last frame as a second image",
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file to write; a PNG file with a plot is written beside it"
    )
    options = parser.parse_args()
    require_plotting(parser, options.output)
    settings = settings_of(parser, options)
    tasks = tasks_of(options.pairs, options.empty, options.last, movers_of(settings))
    started = time.perf_counter()
    results = judge_all(Judge.__call__, tasks, settings, options.processes, every=20)
    summary = summarise(results, settings, time.perf_counter() - started)
    if options.output is not None:
        write(summary, options.output)
        boundary = model_files.locate(settings.model, "artifacts").spec.boundary
        plot(summary, boundary, options.output.with_suffix(".png"))
    print(json.dumps({key: value for key, value in summary.items() if key not in ("residual_ratios", "missed")}))


if __name__ == "__main__":
    main()
