"""Plans the cells of `wanfast bench`: the videos that are measured, and the keys under which their results are stored.

A cell is one video: a recipe, a clip and a repeat. The result and the frames of a cell are an artifact `bench/<key>`,
so that an interrupted run continues with the next cell. The key is a hash of everything that the video depends on: the
plan, the weights, the code, the versions and the hardware.
This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from wanfast.bench.apart import apart
from wanfast.bench.frames import write_frames
from wanfast.magcache_calib.clips import Clip
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, Options, VideoConfig
from wanfast.runtime.config.models import OF_WEIGHTS
from wanfast.runtime.config.option import did_you_mean
from wanfast.runtime.config.recipes import GROUPS, OF_GRID, RECIPES, has_levels, with_recipe
from wanfast.runtime.errors import ConfigError, WanFastError
from wanfast.runtime.facts.choices import EXPERTS, RecipeName
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.machine import gpus, host
from wanfast.runtime.machine.packages import require_attention, versions
from wanfast.runtime.planning.completed import effective
from wanfast.runtime.planning.past_runs import fp8_share
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.shortened import few_lossy_steps, few_steps, has_all_experts, least_steps, schedule_of
from wanfast.runtime.processes.handle import OF_ALL_VIDEOS, OF_HANDLE, Opened
from wanfast.runtime.store.artifacts import ArtifactStore, key_of, write_synced
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.lora_pairs import downloaded_loras, is_distilled, own_folder, pair_for
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import quantized_expert

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SayFn = Callable[[str], None]

KIND = "bench"
CELL, FRAMES = "cell.json", "frames.mp4"
ANOTHER_SEED = 1000  # is added to the seed of the base's other video
# An option that only some recipes can use, and the option of a recipe that enables it.
_ENABLED_BY = {
    "verify": "quantize", "quantize_on_the_fly": "quantize", "compile_mode": "compile",
    "magcache_interpolate": "magcache",
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """This class holds the request of one run of `wanfast bench`: recipes, clips, options, and what is measured."""

    recipes: tuple[RecipeName, ...]  # the first is the base, with which the others are compared
    clips: tuple[Clip, ...]
    given: Options  # override those of each recipe
    files: ModelFiles
    repeats: int = 2
    steps_measured: int | None = None
    no_quality: str = ""  # why the videos are not compared

    def options_of(self, name: RecipeName) -> Options:
        """Returns the options of a recipe's videos: its name, its downloaded LoRAs, and what it can use of `given`.

        LoRAs in the model's own folder come before downloaded ones.
        """
        unusable = {*OF_GRID} if has_levels(name) and "sigmas" not in self.given else set()
        enabled = with_recipe({"recipe": name, **{key: self.given[key] for key in self.given.keys() - unusable}})
        unusable |= {option for option, by in _ENABLED_BY.items() if not enabled.get(by)}
        if enabled.get("guidance_high_noise") == enabled.get("guidance_low_noise") == 1:
            unusable.add("guidance_gate")
        given = {option: value for option, value in self.given.items() if option not in unusable}
        has_own = own_folder(name, self.files.root).is_dir()
        loras = {} if has_own else downloaded_loras(name, self.files.spec, self.files.artifacts)
        return {"recipe": name, **loras, **given}


@dataclass(frozen=True)
class Cell:
    """This class describes a cell: one video of a recipe, a clip and a repeat."""

    clip: int
    repeat: int
    options: Options  # of the video, for the handle
    inputs: dict[str, Any]  # of the key
    is_other_seed: bool = False

    @property
    def key(self) -> str:
        return key_of(self.inputs)[:12]


@dataclass(frozen=True)
class Row:
    """This class holds what `wanfast bench` runs for one recipe; if the recipe cannot run, the row holds the error."""

    recipe: RecipeName
    opened: Opened | None = None
    plans: tuple[Plan, ...] = ()  # the whole video of each clip
    warm_ups: tuple[Options, ...] = ()  # a short video of each clip
    cells: tuple[Cell, ...] = ()
    error: WanFastError | None = None


def recipes_of(text: str) -> tuple[RecipeName, ...]:
    """Returns the recipes that a text such as "exact,published" names, each only once.

    A name is that of a recipe, or of a group of recipes, such as "published". Raises ConfigError if a name is unknown,
    or if the text has no name.
    """
    known: dict[str, tuple[RecipeName, ...]] = {**GROUPS, **{name: (name,) for name in get_args(RecipeName)}}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            fix = did_you_mean(name, known, f"use {', '.join(known)}")
            raise ConfigError(f"--recipes {name:.40}: no such recipe: {fix}")
    if not names:
        raise ConfigError(f"--recipes has an empty value: use {', '.join(known)}")
    return tuple(dict.fromkeys(recipe for name in names for recipe in known[name]))


def check_options(bench: Bench) -> None:
    """Checks the options before any work. If they fit no recipe, raises the ConfigError of the first recipe."""
    errors = []
    for name in bench.recipes:
        try:
            _config(bench, name)
        except ConfigError as error:
            errors.append(error)
        except WanFastError:
            pass  # weights or a curve are missing: `planned` says so, when the weights are known
    if len(errors) == len(bench.recipes):
        raise errors[0]


def _config(bench: Bench, name: RecipeName) -> EffectiveConfig:
    """Returns the config of a recipe's videos. Raises WanFastError if the options do not fit the recipe."""
    num_images = 1 + (bench.clips[0].last_image is not None)  # in a set, all clips or none have a last image
    if RECIPES[name].num_images > num_images and bench.files.spec.takes_images:
        raise ConfigError(
            f"--recipes {name} needs a last image in each line of the set: add --set FOLDER with such lines, or use "
            "another recipe"
        )
    config = effective({**NO_VIDEO, **bench.options_of(name)}, bench.files)
    suits_model = bench.files.spec.takes_images or not RECIPES[name].num_images  # else the plan says what is wrong
    if suits_model and not is_distilled(config.models):
        pair = pair_for(name, bench.files.spec)
        folder = own_folder(name, bench.files.root)
        fix = f"run `wanfast download --lora {pair}`" if pair else f"put LoRAs into {folder}/EXPERT.safetensors"
        raise ConfigError(f"--recipes {name} needs distilled weights: {fix}, or use another recipe")
    if bench.steps_measured is not None:
        _check_steps(config.video, bench.files.spec, bench.steps_measured)
    require_attention(config.models.attention, config.ranks.device)
    return config


def planned(bench: Bench, say: SayFn = lambda line: None) -> list[Row]:
    """Plans the cells of each recipe, and returns one row for each recipe.

    If a recipe needs a quantized expert that is not stored yet, `say` is called with a message, and the expert is
    quantized. If no recipe can run, raises the error of the first recipe.
    """
    rows = [_row(bench, name, say) for name in bench.recipes]
    errors = [row.error for row in rows if row.error]
    if len(errors) == len(rows):
        raise errors[0]
    return rows


def _row(bench: Bench, name: RecipeName, say: SayFn) -> Row:
    options = bench.options_of(name)
    of_models = {option: value for option, value in options.items() if option in OF_HANDLE}
    of_video = {option: value for option, value in options.items() if option not in OF_HANDLE}
    of_all = {option: value for option, value in of_video.items() if option in OF_ALL_VIDEOS}
    try:
        config = _config(bench, name)
        _quantize_missing(bench.files, config, say)
        opened = Opened.of({**of_models, **of_all})
        videos = [{**of_video, **clip.options} for clip in bench.clips]
        plans = tuple(opened.plan(video) for video in videos)
        measured = videos
        if bench.steps_measured is not None:
            of_few = schedule_of(config.video, bench.files.spec, bench.steps_measured)
            measured = [
                few_steps(video, of_few) | _few_in_fp8(plan, bench.steps_measured)
                for video, plan in zip(videos, plans, strict=True)
            ]
        cells = [
            _cell(bench, opened, video, clip, repeat)
            for repeat in range(bench.repeats)
            for clip, video in enumerate(measured)
        ]
        if name == bench.recipes[0] and not bench.no_quality:
            others = ({**video, "seed": video["seed"] + ANOTHER_SEED} for video in measured)
            cells += [_cell(bench, opened, video, clip, 0, other=True) for clip, video in enumerate(others)]
        least = least_steps(config.video, bench.files.spec)
        of_least = schedule_of(config.video, bench.files.spec, least)
        warm_ups = tuple(
            few_steps(video, of_least) | few_lossy_steps(plan) for video, plan in zip(videos, plans, strict=True)
        )
        return Row(name, opened, plans, warm_ups, tuple(cells))
    except WanFastError as error:
        return Row(name, error=error)


def _few_in_fp8(plan: Plan, steps: int) -> dict[str, Any]:
    """Returns options for a video of few `steps`: about the same share of its forwards as in `plan` is in float8."""
    share = fp8_share(plan)
    return few_lossy_steps(plan, max(1, round(share * steps))) if share else {}


def _quantize_missing(files: ModelFiles, config: EffectiveConfig, say: SayFn) -> None:
    """Quantizes the experts that `config` needs, if they are not stored yet. Raises WanFastError."""
    models, device = config.models, config.ranks.device
    if models.quantize is None or models.quantize_on_the_fly:
        return
    experts = [quantized_expert(files, models, expert) for expert in EXPERTS]
    if not all(expert and expert.find() for expert in experts):
        say(f"{models.recipe}: quantizing the experts with {models.quantize}")
        options = {name: getattr(models, name) for name in (*OF_WEIGHTS, "artifacts_dir")}
        apart("quantize", scheme=models.quantize, device=device, **options)


def _check_steps(video: VideoConfig, spec: ModelSpec, steps: int) -> None:
    if steps > video.num_steps or not has_all_experts(video, spec, steps):
        fix = f"use {least_steps(video, spec)} to {video.num_steps}"
        raise ConfigError(
            f"--steps-measured {steps}: the video has {video.num_steps} steps, and each of its experts must run at "
            f"least one step: {fix}"
        )


def _cell(bench: Bench, opened: Opened, video: Options, clip: int, repeat: int, *, other: bool = False) -> Cell:
    plan = opened.plan(dict(video))
    return Cell(clip, repeat, video, _inputs(plan, opened, repeat, keeps=not bench.no_quality), other)


def _inputs(plan: Plan, opened: Opened, repeat: int, *, keeps: bool) -> dict[str, Any]:
    """Returns all inputs of a cell's key. Paths do not count, because the hashes of files do."""
    config = plan.config.to_json()
    for name in ("image", "continue_from", "last_image"):
        del config["video"][name]
    for name in ("model", "artifacts_dir", "verify"):
        del config["models"][name]
    del config["output"]
    stored = (quantized_expert(opened.files, plan.config.models, expert) for expert in EXPERTS)
    on_disk = not plan.config.models.quantize_on_the_fly
    return {
        "config": config,
        "size": [plan.geometry.width, plan.geometry.height],
        "skips": [list(step) for step in plan.skips],
        "facts": plan.spec.to_json(),
        "weights": opened.files.fingerprints,
        "quantized": [expert.require().name for expert in stored if expert and on_disk],
        "code": digest_of_code("runtime/**/*.py", "bench/cells.py", "bench/measure.py", "bench/frames.py"),
        "versions": {name: version for name, version in versions().items() if name != "commit"},
        "hardware": hardware(plan.config.ranks.device),
        "repeat": repeat,
        "has_frames": keeps,
    }


def hardware(device: str) -> dict[str, Any]:
    """Returns `device`, the number of usable CPU cores and, if `device` is cuda, the names of the GPUs."""
    found = [gpu.name for gpu in gpus.visible_gpus()] if device == "cuda" else []
    return {"device": device, "gpus": found, "cores": host.cores()}


@dataclass(frozen=True)
class Cells:
    """This class stores the results of cells in a folder of artifacts."""

    root: Path

    @property
    def folder(self) -> Path:
        """Returns the folder with the results of all benches."""
        return self.root / KIND

    @cached_property
    def _store(self) -> ArtifactStore:
        return ArtifactStore(self.root)

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a cell's result, or None if there is no result yet; a damaged result counts as missing."""
        folder = self._store.find(KIND, cell.inputs, damaged="miss")
        return None if folder is None else read_object(folder / CELL, "remove its folder")

    def frames(self, cell: Cell) -> Path:
        """Returns the file of a finished cell's frames."""
        return self._store.path(KIND, cell.inputs) / FRAMES

    def put(self, cell: Cell, document: dict[str, Any], frames: npt.NDArray[np.uint8]) -> None:
        """Stores the result `document` of a cell.

        If the videos will be compared, this method also stores `frames`, uint8 [F, H, W, 3].
        """

        def write(folder: Path) -> None:
            if cell.inputs["has_frames"]:
                write_frames(frames, folder / FRAMES, document["plan"]["fps"])
            write_synced(folder / CELL, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

        self._store.publish(KIND, cell.inputs, write, versions(), damaged="miss")
