"""A session holds the loaded models of one rank, and makes any number of videos with them.

    session = Session.open(config, ranks)   # prepares the process, finds the files, chooses the attention kernel
    session.encode(clips)                   # loads and frees UMT5 before the experts need its memory
    session.make(job)                       # the first call loads the experts and the VAE
    session.close()

All ranks of a rank group call the same methods in the same order. Only the leader reads images and gets frames. The
module `loading` loads the experts and the VAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.runtime.config import EffectiveConfig, ModelsConfig, VideoConfig
from wanfast.runtime.config.models import is_artifacts_dir_named, without_loras
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import StepTimes, Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe, cudnn_engines, pixels
from wanfast.runtime.engine.compilation import (
    cache_inputs,
    compiled_anew,
    load_caches,
    make_room_for_graphs,
)
from wanfast.runtime.engine.denoise import StepFn
from wanfast.runtime.engine.finite import require_finite
from wanfast.runtime.engine.held_texts import HeldTexts
from wanfast.runtime.engine.loading import load_models, merges_of, replace_loras, stored_experts
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.pixels import Frame, Frames, FramesFn
from wanfast.runtime.engine.prompt_embeds import Encoded, prompt_embeds
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import BRANCHES, Attention, Branch, Expert
from wanfast.runtime.media import earlier_video, images
from wanfast.runtime.media.images import LoadedImage
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.magcache import StepCache
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore, key_of
from wanfast.runtime.store.attention_plans import densities_of
from wanfast.runtime.store.curves import curve_of
from wanfast.runtime.store.model_files import COMPONENTS, Component, ModelFiles
from wanfast.runtime.store.quantized import shards

Sources = dict[str, LoadedImage]  # the decoded images of one video, by their paths, on the leader


@dataclass(frozen=True)
class Made:
    """This class holds the result of one video: its plan, its frames, and figures such as seconds and memory.

    Only the leader has the frames; on other ranks, `frames` is None.
    """

    plan: Plan
    frames: Frames | None  # on the leader
    figures: dict[str, Any]  # for the JSON beside the video


class Session:
    """A session holds the loaded models of one `config`; all videos of the session use these models."""

    def __init__(self, config: EffectiveConfig, ranks: Ranks, files: ModelFiles, *, stores_texts: bool = True) -> None:
        """Stores the arguments and loads nothing; call `open` instead."""
        self.config, self.ranks, self.files, self._stores_texts = config, ranks, files, stores_texts
        self.watch = Stopwatch(ranks.device)  # seconds of each stage since the last video
        self._loads = Stopwatch(ranks.device)  # seconds of each component since the last video
        self._texts = HeldTexts(self._embeddings)
        self._pipeline: VideoPipeline | None = None
        self._stored: dict[str, Path] = {}  # the artifacts of loaded quantized experts
        self._compile_caches: dict[str, str | None] = {}  # what `load_caches` returned, by the key that it looked for

    @classmethod
    def open(cls, config: EffectiveConfig, ranks: Ranks, *, stores_texts: bool = True) -> Session:
        """Returns a new session: prepares the device and finds the model's files, but loads no model yet.

        `stores_texts`: whether the embeddings of new texts are stored as artifacts. If one rank finds an error, all
        ranks raise WanFastError.
        """
        ranks.together(lambda: hardware.prepare(config.ranks.device, config.models.precision, config.models.tf32))
        files = ranks.together(lambda: model_files.locate_for(config.models))
        hardware.use_few_threads(ranks.device, files.spec.dit.dim)
        return cls(config, ranks, files, stores_texts=stores_texts)

    @hardware.one_out_of_memory_error()
    def encode(self, clips: Iterable[tuple[str, ...]]) -> None:
        """Makes the text embeddings of a list of clips.

        `clips` holds the texts of each clip, in the order in which the clips will be made. UMT5 is loaded only if a
        text has no stored embedding. If an embedding is not finite, the other embeddings are still made, and then all
        ranks raise NotFiniteError.
        """
        self._require_finite(self._texts.expect(clips))

    @hardware.one_out_of_memory_error()
    def load(self, before_each: Callable[[], None] = lambda: None) -> VideoPipeline:
        """Loads the two experts and the VAE at the first call; every call returns the pipeline.

        `before_each` is called before each of these three models is loaded. An error in `before_each` stops the
        loading.
        """
        if self._pipeline is None:
            with self.watch.span("load"):
                self._pipeline = load_models(self.files, self.config, self.ranks, self._loads, before_each)
            self._stored = stored_experts(self.files, self.config.models)
        return self._pipeline

    @property
    def is_loaded(self) -> bool:
        """Returns whether the experts and the VAE are loaded."""
        return self._pipeline is not None

    @hardware.one_out_of_memory_error()
    def use_loras(self, models: ModelsConfig) -> None:
        """Replaces the session's LoRAs by the LoRAs of `models`; all other values of `models` must equal the session's.

        Only the experts whose LoRAs differ are read again, into the same memory. Compiled blocks, the VAE and text
        embeddings stay. If a new LoRA does not fit the model, all ranks raise WanFastError, and the session stays as it
        was. A later error frees all models; the session then loads them again when it needs them.
        """
        old, config = self.config.models, dataclasses.replace(self.config, models=models)
        if self._pipeline is None or old == models:
            self.config = config
            return
        merges = self.ranks.together(lambda: merges_of(self.files, models))
        self.config = config
        try:
            with self.watch.span("load"):
                replace_loras(self._pipeline.experts, old, merges, self.files, config, self.ranks, self._loads)
            self._stored = stored_experts(self.files, models)
        except BaseException:
            self.close()
            raise

    def plan(self, job: Job, sources: Sources | None = None) -> tuple[Plan, Tensor]:
        """Returns (the plan of `job`, the n given images [n, 3, H, W] at the plan's size).

        Only the leader reads the images; on other ranks, the returned tensor is empty: [n, 3, 0, 0]. The leader
        adds each decoded image to `sources`, and does not decode images that `sources` already holds.
        """
        pipeline, ranks = self.load(), self.ranks
        read: list[LoadedImage] = []

        def read_here() -> tuple[int, int]:
            read.extend(_read_images(job.config.video, {} if sources is None else sources))
            return read[0].size if read else (0, 0)

        size = ranks.lead(read_here)
        config = job.config.replace(attention=pipeline.attention.kernel)  # so that `--from` uses it too
        curve = ranks.lead(lambda: curve_of(config, self.files))  # under one key, machines may hold different curves
        densities = ranks.lead(lambda: densities_of(config, self.files))
        plan = Plan.of(config, self.files.spec, size, job.notes, job.placement, curve, densities)
        if plan.sparsity and plan.sparsity.has_fp8:
            attention_probe.require_fp8(ranks, config.models.precision, self.files.spec.dit.head_dim)
        plan = dataclasses.replace(plan, requested=job.requested)
        g = plan.geometry
        fitted = [pixels.fit_image(image.pixels, g.width, g.height, config.video.fit) for image in read]
        return plan, torch.stack(fitted) if fitted else torch.empty(len(config.video.images), 3, 0, 0)

    def text_of(self, config: EffectiveConfig) -> dict[Branch, Tensor]:
        """Returns the text embeddings of a video: {branch: embedding [n, text_dim]}.

        The branches are "prompt" and "negative_prompt". n is the number of tokens of the branch's text.
        """
        (texts,) = config.video.texts
        embeds = self._texts.use(texts)
        self._require_finite({*texts} - embeds.keys())
        return {branch: embeds[text] for branch, text in zip(BRANCHES, texts, strict=True)}

    @hardware.one_out_of_memory_error()
    def latent(self, plan: Plan, given: Tensor, on_step: StepFn, residuals: StepCache) -> Tensor:
        """Makes the clean latent [1, 16, T, h, w] of `plan` from the `given` images [n, 3, H, W].

        The cache `residuals` decides which forwards are skipped.
        """
        text = self.text_of(plan.config)
        return self.load().latent(plan, given, text, self.watch, on_step, residuals)

    @hardware.one_out_of_memory_error()
    def make(
        self,
        job: Job,
        on_step: StepFn = lambda done, expert: None,
        residuals: StepCache | None = None,
        on_frames: FramesFn = lambda frames: None,
        start: Frame | None = None,
        sources: Sources | None = None,
    ) -> Made:
        """Makes the single clip of `job`; on the leader, the result contains the frames.

        `on_step(done, expert)` is called before and after each step. `done`: the number of finished steps. `expert`:
        the expert of the step.
        `residuals`: the cache that decides which forwards are skipped. By default, the job's plan decides.
        `on_frames`: the leader calls this function with a few frames at a time, while the next frames are decoded.
        `start`: on the leader, the decoded frame that the clip starts from. By default, it starts from the job's image.
        `sources`: the images that are already decoded. Pass the same dict for all clips of a video.
        Raises WanFastError, and torch.OutOfMemoryError if the device has too little memory.
        """
        text = self.text_of(job.config)  # before the experts need the memory
        pipeline, ranks = self.load(), self.ranks
        plan, given = self.plan(job, sources)
        if start is not None:
            given[0] = pixels.of_decoded(start)
        config = plan.config
        compile_cache = self._warm_start(plan, pipeline.attention.exact) if config.models.compile else None
        compiled = compiled_anew() if config.models.compile else 0
        hardware.reset_peak_memory(config.ranks.device)
        times = StepTimes(ranks.device)

        def stepped(done: int, expert: Expert) -> None:
            times(done)
            on_step(done, expert)

        with cudnn_engines.kept_engines(plan, ranks) as engines:
            cache = residuals or plan.residuals()
            latent = pipeline.latent(plan, given, text, self.watch, stepped, cache)
            frames = pipeline.frames(latent, plan.geometry, self.watch, on_frames)
        peaks = ranks.gather(hardware.peak_memory_bytes(config.ranks.device))
        recompiled = max(ranks.gather(compiled_anew() - compiled if config.models.compile else 0))
        step_s = [round(seconds, 4) for seconds in times.seconds()]
        figures = {
            "seconds": dict(self.watch.seconds),
            "first_step_s": step_s[0],
            "step_s": step_s,
            "attention": dataclasses.asdict(pipeline.attention),
            "attention_check": pipeline.lossy.report() if pipeline.lossy else None,
            "cudnn_engines": cudnn_engines.digest(engines),
            "compile_cache": compile_cache,
            "compiled_anew": recompiled,
            "loading": self._loading(),
            "peak_memory_bytes": max(peaks),
            "peak_memory_bytes_by_rank": peaks,
            "hardware": hardware.describe(config.ranks.device),
            "weights": self.files.fingerprints,
            "quantized": {expert: folder.name for expert, folder in self._stored.items()},
        }
        self.forget_seconds()
        return Made(plan, frames, figures)

    def forget_seconds(self) -> None:
        """Forgets the seconds that were measured so far, so that the figures of the next video begin at zero."""
        self.watch, self._loads = Stopwatch(self.ranks.device), Stopwatch(self.ranks.device)

    def close(self) -> None:
        """Frees the models, the text embeddings and the captured graphs."""
        self._pipeline = None
        self._texts.clear()
        hardware.forget_cuda_graphs()
        hardware.free_memory(self.ranks.device)

    def _embeddings(self, texts: list[str], most: int) -> Encoded:
        with self.watch.span("text"):
            return prompt_embeds(
                texts, self.files, self.config, self.ranks, self._loads, self._free_for_umt5, most,
                stores=self._stores_texts,
            )  # fmt: skip

    def _require_finite(self, not_finite: set[str]) -> None:
        for text in sorted(not_finite):
            self.ranks.together(partial(require_finite, f"UMT5's embedding of the text {text!r:.60}", finite=False))

    def _free_for_umt5(self) -> None:
        """Frees memory of the experts; only a rank that is about to load UMT5 calls this."""
        if self._pipeline is not None:
            self._pipeline.experts.release()
            umt5 = memory.umt5_bytes(self.files.spec.umt5, self.config.models.precision)
            self._pipeline.make_room(umt5 + memory.MARGIN_BYTES)

    def _warm_start(self, plan: Plan, exact: Attention) -> str | None:
        """Loads the caches that `wanfast warmup` stored for this plan and returns their key; None if there are none.

        A session loads the caches of a key once, because its blocks are compiled after the first video of this key. It
        loads them again after the graphs were freed, which happens after very many shapes.
        """
        inputs = cache_inputs(plan, exact)
        if make_room_for_graphs(key := key_of(inputs)):
            self._compile_caches.clear()
        if key not in self._compile_caches:
            store = ArtifactStore(Path(plan.config.models.artifacts_dir))
            is_named = is_artifacts_dir_named(plan.requested)
            self._compile_caches[key] = load_caches(store, inputs, self.ranks, is_named=is_named)
        return self._compile_caches[key]

    def _loading(self) -> dict[str, dict[str, float]]:
        """Returns the seconds and bytes of each component that was loaded; a rank group reads the bytes about once."""
        stored = self._stored

        def sources(component: Component) -> list[Path]:
            return shards(stored[component]) if component in stored else self.files.weights(component)

        return {
            component: {
                "seconds": round(self._loads.seconds[component], 3),
                "bytes": sum(file.stat().st_size for file in sources(component)),
            }
            for component in COMPONENTS
            if component in self._loads.seconds
        }


class Sessions:
    """This class holds the open session of a rank, and replaces it if a job needs other models."""

    def __init__(self, ranks: Ranks, *, stores_texts: bool = True) -> None:
        """`stores_texts`: whether the sessions store the embeddings of new texts as artifacts."""
        self.ranks, self._stores_texts = ranks, stores_texts
        self._open: Session | None = None

    @property
    def are_loaded(self) -> bool:
        """Returns whether a session is open and its models are loaded."""
        return self._open is not None and self._open.is_loaded

    def of(self, config: EffectiveConfig) -> Session:
        """Returns a session with the models of `config`: the open session if it has these models, otherwise a new one.

        If only the LoRAs differ, the open session replaces its LoRAs by those of `config`. Otherwise the open session
        is closed before the new one is opened. If a rank finds an error, all ranks raise WanFastError.
        """
        if self._open is None or without_loras(self._open.config.models) != without_loras(config.models):
            self.close()
            self._open = Session.open(config, self.ranks, stores_texts=self._stores_texts)
        self._open.use_loras(config.models)
        return self._open

    def close(self) -> None:
        """Closes the open session, if there is one."""
        if self._open is not None:
            self._open.close()
        self._open = None


def _read_images(video: VideoConfig, sources: Sources) -> Iterator[LoadedImage]:
    """Yields the given images; those that `sources` lacks are decoded and added to it.

    Raises ConfigError if one cannot be read, or is not the one that was planned.
    """
    planned = {
        "--image": video.image_sha256,
        earlier_video.OPTION: video.continue_from_sha256,
        "--last-image": video.last_image_sha256,
    }
    for option, path in video.images.items():
        if (image := sources.get(path)) is None:
            is_video = option == earlier_video.OPTION
            image = earlier_video.load_earlier(path) if is_video else images.load_image(path, option)
            sources[path] = image
        if image.sha256 != planned[option]:
            raise ConfigError(f"{option} {path}: the file changed since the plan was made: run this command again")
        yield image
