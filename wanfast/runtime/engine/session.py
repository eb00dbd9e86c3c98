"""A session holds the loaded models of one rank, and makes any number of videos with them.

    session = Session.open(config, ranks)   # prepares the process, finds the files, chooses the attention kernel
    session.encode(texts)                   # loads and frees UMT5 before the experts need its memory
    session.make(job)                       # the first call loads the experts and the VAE
    session.close()

All ranks of a rank group call the same methods in the same order. Only the leader reads images and gets frames.
The docstring of `load_models` lists the steps in which a model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

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
    compile_blocks,
    compiled_anew,
    compiler_imported_meanwhile,
    load_caches,
)
from wanfast.runtime.engine.denoise import StepFn
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.pixels import Frame, Frames, FramesFn
from wanfast.runtime.engine.prompt_embeds import prompt_embeds
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS, Attention, Branch, Expert
from wanfast.runtime.media import earlier_video, images
from wanfast.runtime.media.images import LoadedImage
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning.plan import Job, Plan
from wanfast.runtime.sampling.magcache import StepCache
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.attention_plans import densities_of
from wanfast.runtime.store.curves import curve_of
from wanfast.runtime.store.expert_files import identified
from wanfast.runtime.store.loras import inputs_of, loras_of
from wanfast.runtime.store.model_files import COMPONENTS, Component, ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, quantized_expert, shards
from wanfast.runtime.weights.builders import DTYPES, build_expert, build_vae, refill_expert
from wanfast.runtime.weights.checkpoint import MergeFn
from wanfast.runtime.weights.experts import Experts, OffloadedExperts, ResidentExperts
from wanfast.runtime.weights.lora import merge_of

_KEPT_TEXTS = 32  # embeddings that a session keeps, 8 MB each at most; the store has the others


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

    def __init__(self, config: EffectiveConfig, ranks: Ranks, files: ModelFiles) -> None:
        """Stores the arguments and loads nothing; call `open` instead."""
        self.config, self.ranks, self.files = config, ranks, files
        self.watch = Stopwatch(ranks.device)  # seconds of each stage since the last video
        self._loads = Stopwatch(ranks.device)  # seconds of each component since the last video
        self._embeds: dict[str, Tensor] = {}
        self._pipeline: VideoPipeline | None = None
        self._stored: dict[str, Path] = {}  # the artifacts of loaded quantized experts

    @classmethod
    def open(cls, config: EffectiveConfig, ranks: Ranks) -> Session:
        """Prepares the device and finds the model's files; loads nothing yet. Raises WanFastError on all ranks."""
        ranks.together(lambda: hardware.prepare(config.ranks.device, config.models.precision, config.models.tf32))
        files = ranks.together(lambda: model_files.locate_for(config.models))
        hardware.use_few_threads(ranks.device, files.spec.dit.dim)
        return cls(config, ranks, files)

    @hardware.one_out_of_memory_error()
    def encode(self, texts: Iterable[str]) -> None:
        """Makes the embeddings of `texts`; loads UMT5 only for texts whose embeddings are not stored."""
        wanted = list(dict.fromkeys(texts))
        new = [text for text in wanted if text not in self._embeds]
        if new:
            with self.watch.span("text"):
                found = prompt_embeds(new, self.files, self.config, self.ranks, self._loads, self._free_for_umt5)
            self._embeds |= found
        used = {text: self._embeds.pop(text) for text in wanted}
        self._embeds |= used  # the last used come last
        for text in list(self._embeds)[: -max(_KEPT_TEXTS, len(used))]:
            del self._embeds[text]

    @hardware.one_out_of_memory_error()
    def load(self, before_each: Callable[[], None] = lambda: None) -> VideoPipeline:
        """Loads the two experts and the VAE at the first call; every call returns the pipeline.

        `before_each` is called before each of these three models is loaded. An error in `before_each` stops the
        loading.
        """
        if self._pipeline is None:
            with self.watch.span("load"):
                self._pipeline = load_models(self.files, self.config, self.ranks, self._loads, before_each)
            self._stored = _stored_experts(self.files, self.config.models)
        return self._pipeline

    @hardware.one_out_of_memory_error()
    def use_loras(self, models: ModelsConfig) -> None:
        """Replaces the session's LoRAs by the LoRAs of `models`; all other values of `models` must equal the session's.

        Only the experts whose LoRAs differ are read again, into the same memory. Compiled blocks, the VAE and text
        embeddings stay. After an error the session is closed, and the next use of the session loads the models.
        """
        old, self.config = self.config.models, dataclasses.replace(self.config, models=models)
        if self._pipeline is None or old == models:
            return
        try:
            with self.watch.span("load"):
                _merge_anew(self._pipeline.experts, old, self.files, self.config, self.ranks, self._loads)
            self._stored = _stored_experts(self.files, models)
        except BaseException:
            self.close()
            raise

    def plan(self, job: Job) -> tuple[Plan, Tensor]:
        """Returns (the plan of `job`, the n given images [n, 3, H, W] at the plan's size).

        Only the leader reads the images; on other ranks, the returned tensor is empty: [n, 3, 0, 0].
        """
        pipeline, ranks = self.load(), self.ranks
        read: list[LoadedImage] = []

        def read_here() -> tuple[int, int]:
            read.extend(_read_images(job.config.video))
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
        (prompt,), negative_prompt = config.video.prompts, config.video.negative_prompt
        self.encode((prompt, negative_prompt))
        return {"prompt": self._embeds[prompt], "negative_prompt": self._embeds[negative_prompt]}

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
    ) -> Made:
        """Makes the single clip of `job`; on the leader, the result contains the frames.

        If the leader has a frame `start`, the clip starts from this frame instead of the job's image.
        `on_step(done, expert)` is called before and after each step, where `done` is the number of finished steps. The
        leader calls `on_frames` with a few frames at a time, while the next frames are decoded. `residuals` is the
        cache that decides which forwards are skipped; if it is None, the plan decides. Raises WanFastError, and
        torch.OutOfMemoryError if the device has too little memory.
        """
        text = self.text_of(job.config)  # before the experts need the memory
        pipeline, ranks = self.load(), self.ranks
        plan, given = self.plan(job)
        if start is not None:
            given[0] = pixels.of_frame(start)
        config = plan.config
        compile_cache = _warm_start(plan, ranks, pipeline.attention.exact) if config.models.compile else None
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
        """Sets the measured seconds to zero, for the next video. The models stay loaded."""
        self.watch, self._loads = Stopwatch(self.ranks.device), Stopwatch(self.ranks.device)

    def close(self) -> None:
        """Frees the models, the text embeddings and the captured graphs."""
        self._pipeline = None
        self._embeds = {}
        hardware.forget_cuda_graphs()
        hardware.free_memory(self.ranks.device)

    def _free_for_umt5(self) -> None:
        """Frees memory of the experts; only a rank that is about to load UMT5 calls this."""
        if self._pipeline is not None:
            self._pipeline.experts.leave()
            umt5 = memory.umt5_bytes(self.files.spec.umt5, self.config.models.precision)
            self._pipeline.make_room(umt5 + memory.MARGIN_BYTES)

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

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._open: Session | None = None

    def of(self, config: EffectiveConfig) -> Session:
        """Returns a session with the models of `config`: the open session if it has these models, otherwise a new one.

        If only the LoRAs differ, the open session replaces its LoRAs by those of `config`. Otherwise the open session
        is closed before the new one is opened. Raises WanFastError on all ranks.
        """
        if self._open is None or without_loras(self._open.config.models) != without_loras(config.models):
            self.close()
            self._open = Session.open(config, self.ranks)
        self._open.use_loras(config.models)
        return self._open

    def close(self) -> None:
        """Closes the open session, if there is one."""
        if self._open is not None:
            self._open.close()
        self._open = None


def load_models(
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
    before_each: Callable[[], None] = lambda: None,
) -> VideoPipeline:
    """Loads both experts and the VAE, and returns a pipeline that is ready to run.

    The seconds of loading are added to `loads`, for each of these three models. Every rank calls `before_each` before
    it loads each model. Raises WanFastError. An expert is loaded in seven steps; `build_expert` does the first five:

    1. build on the meta device, so that no memory is allocated yet;
    2. quantize: 8-bit layers replace linear layers before weights are read, so that only 8-bit weights are allocated;
    3. shard: parameters are sharded before weights are read, so that a rank reads only its own rows;
    4. fill the parameters from the files: each tensor is merged with its LoRAs while it is read;
    5. fuse the projections q, k and v, if the weights are not sharded;
    6. place both experts, resident or offloaded, after both are filled, because offloaded experts share one set of GPU
       weights;
    7. compile, last, because the compiler needs the final parameters.
    """
    wanted = config.models
    dtype = DTYPES[wanted.precision]
    choice = attention_probe.agree(wanted.attention, ranks, dtype, files.spec.dit.head_dim)
    attend = attention_by(choice.exact)
    lossy = lossy_attention(choice.kernel, attend, files.spec.dit.num_heads, ranks)
    merges = ranks.together(lambda: _merges(files, wanted))

    def build(expert: Expert) -> WanDiT:
        before_each()
        with loads.span(expert):
            return build_expert(
                files,
                expert,
                wanted.precision,
                ranks,
                attend=attend,
                sharded=config.ranks.dit_fsdp == "on",
                **_filling(files, config, expert, merges),
            )

    with compiler_imported_meanwhile(config):
        models: dict[Expert, WanDiT] = {"high_noise": build("high_noise"), "low_noise": build("low_noise")}
        experts = _place(models, config, ranks)
        before_each()
        with loads.span("vae"):
            decoder = wanted.vae_precision or wanted.precision
            vae = ranks.together(lambda: build_vae(files, ranks.device, decoder))
    if lossy:
        for model in models.values():
            lossy.use_in(model)
    if wanted.compile:
        for model in models.values():
            compile_blocks(model, wanted.compile_mode)
    return VideoPipeline(files.spec, experts, vae, ranks, choice, lossy)


def lossy_attention(kernel: Attention, dense: AttentionFn, num_heads: int, ranks: Ranks) -> LossyAttention | None:
    """Returns what computes self-attention if `kernel` is lossy; `dense` computes the calls that stay exact."""
    if kernel == "sparse":
        return SparseAttention(dense, num_heads, ranks)
    return Fp8Attention(num_heads, ranks) if kernel == "fa3-fp8" else None


def _merge_anew(
    experts: Experts, old: ModelsConfig, files: ModelFiles, config: EffectiveConfig, ranks: Ranks, loads: Stopwatch
) -> None:
    """Overwrites the experts whose LoRAs are not those of the `old` models. Raises WanFastError."""
    merges = ranks.together(lambda: _merges(files, config.models))
    for expert in EXPERTS:
        if inputs_of(loras_of(old), expert) != inputs_of(loras_of(config.models), expert):
            with loads.span(expert):
                model, held = experts.writable(expert)
                refill_expert(model, held, files, expert, ranks, **_filling(files, config, expert, merges))


class _Filling(TypedDict):
    """Says how an expert's parameters are filled."""

    quantized: QuantizedExpert | None
    on_the_fly: bool
    device: str | None
    merge: MergeFn


def _filling(files: ModelFiles, config: EffectiveConfig, expert: Expert, merges: dict[Expert, MergeFn]) -> _Filling:
    return {
        "quantized": quantized_expert(files, config.models, expert),
        "on_the_fly": config.models.quantize_on_the_fly,
        "device": "cpu" if config.ranks.expert_offload == "on" else None,
        "merge": merges[expert],
    }


def _place(models: dict[Expert, WanDiT], config: EffectiveConfig, ranks: Ranks) -> Experts:
    if config.ranks.expert_offload == "on":
        return OffloadedExperts(models, ranks.device)
    may_move = config.models.compile_mode != "max-autotune" or ranks.size == 1
    return ResidentExperts(models, ranks.device, may_move=may_move)


def _merges(files: ModelFiles, models: ModelsConfig) -> dict[Expert, MergeFn]:
    """Returns for each expert the function that merges its LoRAs.

    The LoRAs of both experts are checked before a weight is read, and so are the files of experts that options name.
    """
    if (now := identified(models)) != models:
        option = "--lora" if now.expert_sha256 == models.expert_sha256 else "an expert"
        raise ConfigError(f"{option}: a file changed since the plan was made: run this command again")
    return {expert: merge_of(loras_of(models), expert, files.spec.dit) for expert in EXPERTS}


def _stored_experts(files: ModelFiles, models: ModelsConfig) -> dict[str, Path]:
    """Returns the artifacts from which quantized experts are read."""
    if models.quantize_on_the_fly:
        return {}
    return {name: expert.require() for name in EXPERTS if (expert := quantized_expert(files, models, name))}


def _warm_start(plan: Plan, ranks: Ranks, exact: Attention) -> str | None:
    """Loads the caches that `wanfast warmup` stored for this plan and returns their key; None if there are none."""
    inputs = cache_inputs(plan.config, plan.spec.dit, plan.geometry.tokens, exact)
    store = ArtifactStore(Path(plan.config.models.artifacts_dir))
    return load_caches(store, inputs, ranks, is_named=is_artifacts_dir_named(plan.requested))


def _read_images(video: VideoConfig) -> Iterator[LoadedImage]:
    """Yields the given images. Raises ConfigError if one cannot be read, or is not the one that was planned."""
    planned = {
        "--image": video.image_sha256,
        earlier_video.OPTION: video.continue_from_sha256,
        "--last-image": video.last_image_sha256,
    }
    for option, path in video.images.items():
        is_video = option == earlier_video.OPTION
        image = earlier_video.load_earlier(path) if is_video else images.load_image(path, option)
        if image.sha256 != planned[option]:
            raise ConfigError(f"{option} {path}: the file changed since the plan was made: run this command again")
        yield image
