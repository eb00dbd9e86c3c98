"""The handle of the Python API starts the ranks, and gives them one video after another to make.

The module does not import torch, because only the ranks need torch, and the ranks are other processes. All methods
may be called from any thread. Videos are made one at a time. If a rank dies, the video that it was making fails, and
the ranks are started again for the next video. If an idle rank dies, no video fails.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from wanfast.runtime.config import (
    NO_VIDEO,
    OPTIONS,
    EffectiveConfig,
    ModelsConfig,
    OutputConfig,
    RanksConfig,
    accepted,
    parse_size,
)
from wanfast.runtime.config.models import OF_LOSSY, without_loras
from wanfast.runtime.config.option import absolute, options_of
from wanfast.runtime.config.precedence import without_overridden
from wanfast.runtime.config.recipes import RECIPES, with_recipe
from wanfast.runtime.errors import CancelledError, ConfigError, from_failure
from wanfast.runtime.facts.choices import LOSSY_ATTENTION, RecipeName
from wanfast.runtime.machine.launchers import refuse_launchers
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.machine.packages import require_attention
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.completed import effective, model_of
from wanfast.runtime.planning.image_inputs import earlier_facts
from wanfast.runtime.planning.placement import FreeMemory, check_skips, measure, place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.progress import StageFn
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.processes.arriving import ArrivingFrames
from wanfast.runtime.processes.launch import RankGroups
from wanfast.runtime.processes.run_folder import new_run_folder
from wanfast.runtime.store.lora_pairs import is_distilled, own_loras
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, require_experts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_WORKER = "wanfast.runtime.jobs.generate"
_LORAS = {name for name, option in OPTIONS.items() if option.is_repeatable and option.option.path}
OF_HANDLE = {*options_of(ModelsConfig), *options_of(RanksConfig)} - _LORAS - OF_LOSSY.keys()
# `open` accepts these too: size and frames of the largest video; and for videos that name no others, LoRAs and settings
# of lossy attention.
OF_ALL_VIDEOS = {"frames", "size", *_LORAS, *OF_LOSSY}
_OF_RECIPES = {name for recipe in RECIPES.values() for name in (*recipe.options, *recipe.of_several_ranks)} & OF_HANDLE
RecordFn = Callable[[Plan, "npt.NDArray[np.uint8]"], None]
_PAUSE_S = 0.1  # between two looks whether a waiting `make` is cancelled


@dataclasses.dataclass(frozen=True, repr=False)
class Video:
    """This class holds a finished video: its frames and its JSON document."""

    frames: npt.NDArray[np.uint8]
    """[F, H, W, 3], 0..255."""
    document: dict[str, Any]
    """The JSON that is written beside a saved video: options, plan, seconds, versions."""

    def __repr__(self) -> str:
        num_frames, height, width, _ = self.frames.shape
        return f"Video({num_frames} frames, {width}x{height}, seed {self.plan['seed']})"

    @property
    def plan(self) -> dict[str, Any]:
        """Returns the plan that ran: sizes, steps, guidance, skips, mesh, notes."""
        plan: dict[str, Any] = self.document["plan"]
        return plan

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False, contact_sheet: bool = False) -> None:
        """Writes the video to the .mp4 file `path`, and the options, plan and seconds to a .json file beside it.

        `wanfast generate --from` can repeat the video from the .json. `contact_sheet`: whether a picture with a few
        frames is written too. Raises ConfigError if a file cannot be written, or if a file exists and `overwrite` is
        false. An image or a video from which this video was made is never overwritten: ConfigError is raised.
        """
        from wanfast.runtime.media import video_file

        output = OutputConfig(output=os.fspath(path), overwrite=overwrite, contact_sheet=contact_sheet)
        outputs = output.paths
        self._check_outputs(outputs, overwrite=overwrite)
        needed_bytes = self.frames.nbytes // 4
        video_file.check_outputs(
            str(outputs[0]), *outputs[1:], overwrite=overwrite, needed_bytes=needed_bytes, option="save"
        )
        sidecar.write_video(self.frames, sidecar.moved(self.document, output), outputs, overwrite=overwrite)

    def _check_outputs(self, outputs: tuple[Path, ...], *, overwrite: bool) -> None:
        """Raises ConfigError for a file that exists, and for an image or a video that the video is made from."""
        video = self.document["effective"]["video"]
        sources = {Path(video[name]).resolve() for name in ("image", "continue_from", "last_image") if video[name]}
        for target in outputs:
            if target.resolve() in sources:
                raise ConfigError(f"save: {target} is a file that this video is made from: choose another name")
            if os.path.lexists(target) and not overwrite:
                raise ConfigError(f"{target} exists: choose another name, or save with overwrite=True")


@dataclasses.dataclass(frozen=True)
class Opened:
    """This class holds what `open` decided for all videos of a handle: the models, the ranks and the placement."""

    asked: dict[str, Any]  # the options that were given
    options: dict[str, Any]  # those of every video, with models and ranks as decided
    placed: Plan  # of the largest video
    files: ModelFiles  # verified, and so not verified again for each video
    free_memory: FreeMemory  # before the ranks load models
    required: set[tuple[QuantizedExpert, bool]]  # the artifacts that were found, for `require_experts`

    @classmethod
    def of(cls, asked: dict[str, Any]) -> Opened:
        """Plans the largest video of a handle, and returns the models, ranks and placement of this plan.

        `asked`: the options that `open` got. If `asked` has no `size`, the video has the model's own size. Raises
        WanFastError if an option is wrong, if weights or artifacts are missing, if the ranks form more than one rank
        group, or if the video does not fit into memory.
        """
        asked = accepted(asked)
        given, files, config = checked(asked)
        files.require()
        files.identify()
        required: set[tuple[QuantizedExpert, bool]] = set()
        require_experts(files, config.models, required)
        plan = Plan.of(config, files.spec, parse_size(config.video.size))
        free_memory = measure(config.ranks)
        (plan,) = place([dataclasses.replace(plan, requested=given)], free_memory)
        if plan.mesh.replica > 1:
            raise ConfigError(
                f"num_gpus={plan.config.ranks.num_gpus} gives {plan.mesh.replica} rank groups, but a handle makes only "
                f"one video at a time: use num_gpus={plan.mesh.group_size}"
            )
        decided = plan.config.options()
        options = {**asked, **{name: decided[name] for name in OF_HANDLE | (_LORAS & asked.keys())}}
        return cls(asked, options, plan, files, free_memory, required)

    def has_models_of(self, recipe: RecipeName, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Returns whether the loaded models are those of `recipe`, so that a video by this recipe can be made.

        LoRAs do not count, because each video may have its own: those in `options`, the options of the video, or
        those of `open`, or those that the model has for the recipe. But a recipe that needs distilled weights needs
        one of these. If `open` got --attention, it overrides the recipe's attention if this is lossy, as in any other
        run.
        """
        if recipe == self.asked.get("recipe"):
            return True
        loaded = {name: value for name, value in with_recipe(self.asked).items() if name in _OF_RECIPES}
        given = RECIPES[recipe].given(self.asked)
        if (kernel := self.asked.get("attention")) and given.get("attention") in LOSSY_ATTENTION:
            given = {**given, "attention": kernel}
        own = {name: value for name, value in given.items() if name in OF_HANDLE}
        named = {name: value for name, value in {**self.asked, **options}.items() if name in _LORAS and value}
        models = dataclasses.replace(without_loras(self.placed.config.models), recipe=recipe, **named)
        of_model: dict[str, Any] = {**own_loras(models, self.files.root)}
        models = dataclasses.replace(models, **of_model)
        return own == loaded and is_distilled(models)

    def plan(self, options: dict[str, Any]) -> Plan:
        """Plans one video for these models and ranks; `options` are the options that `Handle.make` got.

        Raises WanFastError if an option is wrong, if an artifact is missing, or if the video does not fit into memory.
        """
        options = accepted(options)
        _refuse(options, options.keys() & OF_HANDLE - {"recipe"}, "the handle", "wanfast.open")
        recipe = options.get("recipe")
        if recipe is not None and not self.has_models_of(recipe, options):
            fits = ", ".join(name for name in RECIPES if self.has_models_of(name))
            fix = f"use a recipe that fits the loaded models ({fits})"
            if not fits:
                fix = f"leave out --recipe, or use a handle or a server that is started with --recipe {recipe}"
            raise ConfigError(f"--recipe {recipe}: the loaded models are not those of this recipe: {fix}")
        _refuse(options, options.keys() & options_of(OutputConfig).keys(), "the output file", "Video.save")
        nearer = {name: value for name, value in options.items() if value is not None}
        plan, _ = resolve({**without_overridden(self.options, nearer), **options}, writes=False, files=self.files)
        if plan.config.models != self.placed.config.models:  # other LoRAs need other quantized experts
            require_experts(self.files, plan.config.models, self.required)
        plan = dataclasses.replace(plan, requested={**without_overridden(self.asked, nearer), **options})
        # The models that the ranks hold now are part of the sum, and the ranks keep their mesh.
        (plan,) = place([plan], self.free_memory, self.placed.mesh)
        check_skips(plan)
        return plan


def checked(asked: dict[str, Any]) -> tuple[dict[str, Any], ModelFiles, EffectiveConfig]:
    """Checks the options of `open` without looking for weights.

    Returns the options of the largest video, the model's files and the config. Raises WanFastError if an option is
    wrong.
    """
    asked = accepted(asked)
    _refuse(asked, asked.keys() - OF_HANDLE - OF_ALL_VIDEOS, "a video", "Handle.make")
    if asked.get("nnodes", 1) != 1:
        raise ConfigError("a handle uses one machine: drop nnodes")
    refuse_launchers("this program", "run it", "num_gpus=")
    given = {**NO_VIDEO, **_of_any_plan(asked)}
    files = model_of(given)
    config = effective(given, files)
    require_attention(config.models.attention, config.ranks.device)
    return given, files, config


class Handle:
    """A handle owns ranks with loaded models; `wanfast.open` returns a handle.

    At the end, call the handle's `close`. Or use the handle in a `with` block, which closes the handle at its end.
    """

    def __init__(self, opened: Opened, *, stores_texts: bool = True) -> None:
        """Starts the ranks; they become ready while the first video is planned. Raises ConfigError.

        `stores_texts`: whether texts of videos stay on disk, in stored embeddings and in the run folder. If false, a
        text is encoded again if it is not among the last 32 texts.
        """
        config = opened.placed.config
        self._opened, self._lock = opened, threading.Lock()
        self._calls: set[threading.Event] = set()  # one for each `make` that has begun; set: it is cancelled
        self._owner: int | None = None  # the thread that holds the lock
        self._folder = new_run_folder(Path(config.models.artifacts_dir), {"verb": "open", **opened.asked})
        self._ranks: RankGroups | None = RankGroups(self._folder, config.ranks, groups=1, stores_texts=stores_texts)
        self._unclosed = weakref.finalize(self, self._ranks.stop)  # if nobody closes the handle

    def make(
        self,
        *,
        on_progress: StageFn = lambda stage, done, total: None,
        on_frames: RecordFn = lambda plan, frames: None,
        **options: Any,
    ) -> Video:
        """Makes one video and waits for it.

        `options`: options of `wanfast generate` by their Python names; `magcache_k` means --magcache-k. LoRAs,
        settings of lossy attention and `recipe` are accepted. The loaded models must fit the recipe. `make` refuses all
        other options of models and ranks (pass them to `wanfast.open`), and the options of the output file (pass them
        to `Video.save`).
        `on_progress(stage, steps done, number of steps)` and `on_frames(plan, frames)` are called in the thread that
        called `make`. `on_frames` gets a few frames [f, H, W, 3] at a time, while later frames are decoded. If
        `on_progress` or `on_frames` raises an exception, the video is cancelled and `make` raises that exception.
        Raises ConfigError if an option is wrong, RankFailedError if a rank died, CancelledError after a call of
        `cancel`, or another WanFastError.
        """
        with self._call() as cancelled:
            self._living()  # before the work of a plan
            return self._run(self._opened.plan(options), on_progress, cancelled, on_frames)

    def cancel(self) -> None:
        """Cancels all calls of `make` that have begun: each call raises CancelledError at its next step or stage."""
        for cancelled in list(self._calls):
            cancelled.set()

    def close(self) -> None:
        """Waits for the current video, then ends the ranks. To end the current video too, call `cancel` first."""
        with self._turn(threading.Event()):
            ranks, self._ranks = self._ranks, None
            self._unclosed.detach()
            if ranks is not None:
                ranks.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        plan: Plan,
        on_progress: StageFn,
        cancelled: threading.Event,
        on_frames: RecordFn = lambda plan, frames: None,
    ) -> Video:
        """Lets the ranks make a planned video, and returns it."""
        with self._turn(cancelled), ArrivingFrames(partial(on_frames, plan)) as arriving:
            (result,) = self._living().run(
                _WORKER,
                [plan.job().to_json()],
                [],
                on_result=lambda index, result: None,
                on_progress=lambda index, stage, done, total: on_progress(stage, done, total),
                on_look=arriving.look,
                cancelled=cancelled.is_set,
            )
            if "error" in result:
                raise from_failure(result)
            Path(result.pop("frames")).unlink(missing_ok=True)
            return Video(arriving.frames, result)

    @contextmanager
    def _call(self) -> Iterator[threading.Event]:
        """Yields an event that `cancel` sets until the block ends."""
        cancelled = threading.Event()
        self._calls.add(cancelled)
        try:
            yield cancelled
        finally:
            self._calls.remove(cancelled)

    @contextmanager
    def _turn(self, cancelled: threading.Event) -> Iterator[None]:
        """Holds the lock on the ranks for a block. Raises CancelledError while it waits, if `cancelled` is set."""
        if self._owner == threading.get_ident():
            raise ConfigError(
                "on_progress cannot make a video or close the handle: do so after on_progress returns, or call cancel"
            )
        while not self._lock.acquire(timeout=_PAUSE_S):
            if cancelled.is_set():
                raise CancelledError
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()

    def _living(self) -> RankGroups:
        if self._ranks is None:
            raise ConfigError("this handle is closed: call wanfast.open again")
        return self._ranks


def open(**options: Any) -> Handle:
    """Starts ranks and returns their handle, and does not wait until the models are loaded.

    `options`: the options of `wanfast generate` for models and ranks, and the `size` and `frames` of the largest video
    that will be made. Each option has its Python name: `num_gpus` means --num-gpus. LoRAs and settings of lossy
    attention may be given here or for each video. Raises WanFastError if an option is wrong, if weights or artifacts
    are missing, if the video does not fit into memory, or if the ranks cannot be started.
    """
    return Handle(Opened.of(options))


def make(*, on_progress: StageFn = lambda stage, done, total: None, **options: Any) -> Video:
    """Opens a handle, makes one video and closes the handle. Accepts the options of `open` and of `Handle.make`.

    The video is planned before the ranks start, so that a wrong option is refused at once.
    """
    options = accepted(options)
    of_handle = {name: value for name, value in options.items() if name in OF_HANDLE}
    of_video = {name: value for name, value in options.items() if name not in OF_HANDLE}
    largest = {name: options[name] for name in OF_ALL_VIDEOS & options.keys()}
    with asked_once():  # an earlier video is decoded once
        if (earlier := options.get("continue_from")) and options.get("size") is None:
            width, height = earlier_facts(absolute(earlier, "--continue-from")).size
            largest["size"] = f"{width}x{height}"
        opened = Opened.of({**of_handle, **largest})
        plan = opened.plan(of_video)
    with Handle(opened) as handle:
        return handle._run(plan, on_progress, threading.Event())


def _of_any_plan(asked: dict[str, Any]) -> dict[str, Any]:
    """Replaces a plan of attention by lists of all blocks, which take the most memory that a plan may need.

    A plan must fit a video's steps and size, so that it is found when a video is planned.
    """
    if asked.get("attention_plan") is None:
        return asked
    return {**asked, "attention_plan": None, "density": 1.0, "dense_layers": 0}


def _refuse(options: dict[str, Any], refused: set[str], owner: str, method: str) -> None:
    if refused:
        option = next(name for name in options if name in refused)
        raise ConfigError(f"{option} is an option of {owner}: pass it to {method}")
