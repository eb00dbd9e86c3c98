"""Turns a request into a plan: every option has a value and every file is checked, but no video is made.

`resolve` makes an effective config from the options that were given. From this config and the facts of the model,
`Plan.of` derives the geometry, the schedule and the steps of each expert. Later, `placement.place` decides the mesh of
ranks. Parent and ranks derive the same plan from the same config, so that the printed plan is the plan that runs.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from wanfast.runtime.config import EffectiveConfig, Options, OutputConfig, RanksConfig, VideoConfig, parse_size
from wanfast.runtime.config.recipes import RECIPES, overridden
from wanfast.runtime.errors import ConfigError, NeedsGpuError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS, LOSSY_ATTENTION, Device, Expert, ImageFit
from wanfast.runtime.facts.densities import Densities
from wanfast.runtime.facts.fp8_schedule import Fp8Schedule
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, ModelSpec
from wanfast.runtime.facts.shapes import Geometry, geometry_of, inner_size, middle_box
from wanfast.runtime.facts.sparsity import BLOCK, Sparsity
from wanfast.runtime.machine import gpus, host
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.media import images, video_file
from wanfast.runtime.media.earlier_video import load_earlier
from wanfast.runtime.media.tokenizer import PromptTokenizer, clean_prompt
from wanfast.runtime.planning.prompt_extension import extended
from wanfast.runtime.sampling.guidance import gate_steps, guided_steps
from wanfast.runtime.sampling.magcache import (
    MagCacheSettings,
    Ratios,
    ResidualCache,
    Skips,
    accumulated_error,
    plan_best,
    plan_skips,
)
from wanfast.runtime.sampling.scheduler import Levels, Step, solve
from wanfast.runtime.store import attention_plans, model_files
from wanfast.runtime.store.attention_plans import densities_of
from wanfast.runtime.store.curves import Curve, curve_of, levels_of, magcache_notes, settle
from wanfast.runtime.store.expert_files import expert_notes, identified, named_experts
from wanfast.runtime.store.lora_pairs import own_loras, require_distilled
from wanfast.runtime.store.loras import lora_notes, loras_of
from wanfast.runtime.store.model_files import ModelFiles

_FLOAT8_CAPABILITY, _HOPPER = (8, 9), (9, 0)
_MOST_STRETCH = 0.05  # of a last image, without a note: a size in multiples of 16 pixels stretches a little
_MP4_BYTES_PER_PIXEL = 0.25  # an upper estimate at CRF 10: a video with much detail needs about half


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan describes completely what will run for one video."""

    config: EffectiveConfig
    requested: Options = field(default_factory=dict)  # the options that were given
    spec: ModelSpec
    geometry: Geometry
    levels: Levels
    schedule: tuple[Step, ...]
    experts: tuple[Expert, ...]  # of each step
    notes: tuple[str, ...] = ()
    placement: str = ""  # where the weights lie, and why
    curve: Curve | None = None  # decides which forwards are skipped
    densities: Densities | None = None  # of sparse attention, if a plan of attention gives them
    residuals_a_branch: int = 0  # held from step to step
    may_regroup: bool = True  # whether the ranks may share tokens otherwise in steps without guidance

    @classmethod
    def of(
        cls,
        config: EffectiveConfig,
        spec: ModelSpec,
        image_size: tuple[int, int],
        notes: tuple[str, ...] = (),
        placement: str = "",
        curve: Curve | None = None,
        densities: Densities | None = None,
    ) -> Plan:
        """Derives a plan from a config, a model and the (width, height) of the image.

        `config` is an effective config, such as `effective` returns. `curve` holds MagCache's ratios, or is None
        without MagCache. `densities` holds the densities of a plan of attention, or is None without such a plan.
        """
        video = config.video
        levels = levels_of(video)
        experts = tuple(levels.experts(spec.boundary, video.switch_step))
        return cls(
            config=config,
            spec=spec,
            geometry=geometry_of(
                spec, "crop" if video.continue_from else video.fit, parse_size(video.size), video.frames, image_size
            ),
            levels=levels,
            schedule=solve(video.solver, levels, experts.count("high_noise")),
            experts=experts,
            notes=notes,
            placement=placement,
            curve=curve,
            densities=densities,
            residuals_a_branch=0 if curve is None else 2 if _extrapolates(config) else 1,
        )

    def job(self) -> Job:
        """Returns the part of the plan that goes to the ranks; the ranks derive the rest of the plan from this part."""
        return Job(config=self.config, requested=dict(self.requested), notes=self.notes, placement=self.placement)

    @property
    def outputs(self) -> tuple[Path, ...]:
        return self.config.output.paths

    @property
    def mesh(self) -> Mesh:
        """Returns the mesh that the ranks of all machines form together."""
        return self.config.ranks.mesh

    @property
    def guidance(self) -> dict[Expert, float]:
        return {"high_noise": self.config.video.guidance_high_noise, "low_noise": self.config.video.guidance_low_noise}

    @property
    def joining_bytes(self) -> int:
        """Returns the size, in bytes of host memory, of the array that holds all frames of joined clips.

        The caller gets this array. The result is 0 if nothing is joined, or if the frames are written to a file while
        they are decoded.
        """
        video = self.config.video
        is_joined = video.continue_from or len(video.prompts) > 1
        if self.outputs or not is_joined:
            return 0
        return video.total_frames * self.geometry.height * self.geometry.width * 3

    @property
    def timesteps(self) -> dict[Expert, list[int]]:
        """Returns the timesteps of each expert, in the order of the steps."""
        split: dict[Expert, list[int]] = {"high_noise": [], "low_noise": []}
        for expert, step in zip(self.experts, self.schedule, strict=True):
            split[expert].append(step.timestep)
        return split

    @property
    def num_forwards(self) -> int:
        """Returns the number of forwards of all steps, including the skipped forwards.

        A step has two forwards if the negative prompt's branch runs, and otherwise one.
        """
        return sum(1 + both for both in self.guided)

    @cached_property
    def guided(self) -> list[bool]:
        """Returns for each step whether the negative prompt's branch runs."""
        return guided_steps(self.experts, self.guidance, self.config.video.guidance_gate)

    @property
    def unguided_mesh(self) -> Mesh:
        """Returns the mesh of the steps without guidance."""
        return self.mesh.unguided(self.spec.dit.num_heads) if self.may_regroup else self.mesh

    @property
    def regroups(self) -> bool:
        """Returns whether the plan has steps without guidance, and runs these steps on another mesh than `mesh`."""
        return self.unguided_mesh != self.mesh and not all(self.guided)

    @property
    def always_computed(self) -> list[int]:
        """Returns the steps whose forwards are never skipped, whatever the curve and the settings of MagCache say.

        These are three kinds of steps:
        * steps after the end of the curve, because they belong to distilled weights;
        * an expert's last step with guidance, because the later steps reuse the difference of this step's branches;
        * an expert's first step without guidance: the ranks regroup before it, so their stored residuals do not fit.
        """
        distilled = range(len(self.schedule) if self.curve is None else self.curve.num_steps, len(self.schedule))
        return [*gate_steps(self.experts, self.guided), *distilled]

    @property
    def is_joint(self) -> bool:
        """Returns whether both branches of guidance skip the same forwards.

        If each branch has its own ranks, a skip of only one branch saves no time: the ranks that skip wait for the
        ranks of the other branch.
        """
        return self.config.skipping is not None and self.config.skipping.magcache_joint == "on"

    @cached_property
    def skips(self) -> list[Skips]:
        """Returns for each step and branch whether MagCache skips the forward.

        Raises ConfigError if --magcache-budget or --magcache-skip cannot be met.
        """
        return self._skips(joint=self.is_joint)

    def _skips(self, *, joint: bool) -> list[Skips]:
        if self.curve is None:
            return [(False, False)] * len(self.schedule)
        s, ratios, guided = self.config.skipping, self._ratios, tuple(self.guided)
        experts, always = self.experts, tuple(self.always_computed)
        assert s and s.magcache_k is not None and s.retention_ratio is not None and s.magcache_rule is not None
        threshold = s.magcache_thresh or 0.0  # a budget has no threshold
        settings = MagCacheSettings(threshold, s.magcache_k, s.retention_ratio, s.magcache_rule)
        if s.magcache_thresh is not None:
            return list(_planned_skips(ratios, experts, settings, None, True, joint, guided, always))
        option, wanted = f"--magcache-skip {s.magcache_skip}", s.magcache_skip
        if wanted is None:
            budget = s.magcache_budget or 0.0
            option, wanted = f"--magcache-budget {budget:g}", int((1 - budget) * self.num_forwards + 1e-9)
        exactly = s.magcache_skip is not None
        try:
            return list(_planned_skips(ratios, experts, settings, wanted, exactly, joint, guided, always))
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None

    @property
    def _ratios(self) -> Ratios:
        """Returns the curve's ratios, and then a 1 for each distilled step, which is never skipped."""
        known = () if self.curve is None else self.curve.ratios
        return (*known, *[(1.0, 1.0)] * (len(self.schedule) - len(known)))

    def residuals(self) -> ResidualCache:
        """Returns an empty cache that follows the plan's skips."""
        alike = zip(self.experts, self.guided, strict=True)  # between unlike steps, the ranks may regroup
        levels = [(kind, step.sigma) for kind, step in zip(alike, self.schedule, strict=True)]
        return ResidualCache(self.skips, levels if _extrapolates(self.config) else None)

    def num_residuals(self, mesh: Mesh) -> int:
        """Returns the largest number of MagCache residuals, of all branches, that a rank of `mesh` holds at one time.

        With --magcache-extrapolate, the number includes the extrapolated residual, which exists for a short time.
        """
        held = self.residuals_a_branch * self._num_branches(mesh)
        return held + (1 if self.curve is not None and _extrapolates(self.config) else 0)

    @cached_property
    def sparsity(self) -> Sparsity | None:
        """Returns which calls of self-attention are sparse; None without --attention sparse. Raises ConfigError."""
        models, densities = self.config.models, self.densities
        if models.attention != "sparse":
            return None
        if densities is None:
            assert models.density is not None
            densities = Densities.uniform(models.density, self.spec.dit.num_layers, self.spec.dit.num_heads)
        return Sparsity.of(
            self.geometry.token_grid,
            densities=densities,
            num_steps=len(self.schedule),
            dense_share=models.dense_share,
            dense_layers=models.dense_layers,
            lists_every=models.lists_every,
            has_last=self.config.video.last_image is not None,
        )

    @cached_property
    def fp8(self) -> Fp8Schedule | None:
        """Returns which calls of self-attention are in float8; None without --attention fa3-fp8. Raises ConfigError."""
        models, dit = self.config.models, self.spec.dit
        if models.attention != "fa3-fp8":
            return None
        return Fp8Schedule.of(
            num_steps=len(self.schedule),
            num_layers=dit.num_layers,
            head_dim=dit.head_dim,
            steps=models.fp8_steps,
            layers=models.fp8_layers,
            hadamard=models.fp8_hadamard,
        )

    def list_bytes(self, mesh: Mesh) -> int:
        """Returns how many bytes a rank of `mesh` holds in lists of blocks, summed over the rank's branches."""
        if self.sparsity is None:
            return 0
        return self._num_branches(mesh) * self.sparsity.list_bytes(mesh.ulysses)

    def _num_branches(self, mesh: Mesh) -> int:
        """Returns the largest number of branches of guidance that a rank of `mesh` computes in a step."""
        return 2 if any(self.guided) and mesh.cfg == 1 else 1

    def sparsity_json(self) -> dict[str, Any] | None:
        """Returns the density and the settings of sparse attention as JSON; None without --attention sparse."""
        if self.sparsity is None:
            return None
        computed = [1 + both - sum(skips) for both, skips in zip(self.guided, self.skips, strict=True)]
        ulysses = [(self.mesh if both else self.unguided_mesh).ulysses for both in self.guided]
        return self.sparsity.to_json() | {
            "mean_density": round(self.sparsity.mean_density(computed, [1] * len(computed)), 4),
            "slowest_rank_density": round(self.sparsity.mean_density(computed, ulysses), 4),
            "list_bytes": self.list_bytes(self.mesh),
            **self._attention_plan_json(self.sparsity),
        }

    def _attention_plan_json(self, sparsity: Sparsity) -> dict[str, Any]:
        """Returns the plan of attention as JSON: its measured errors, and the mean densities by band and layer."""
        if self.densities is None or self.densities.calibrated is None:
            return {}
        return {"plan": dataclasses.asdict(self.densities.calibrated) | {"bands": sparsity.bands_json()}}

    def magcache_json(self) -> dict[str, Any] | None:
        """Returns the skips, their settings and their curve as JSON; None if MagCache is off."""
        if self.curve is None:
            return None
        settings, skipped = self.config.skipping, sum(map(sum, self.skips))
        assert settings is not None
        apart = sum(map(sum, self._skips(joint=False))) if self.is_joint and settings.magcache_skip is None else None
        return {
            "curve": self.curve.name,
            "interpolated_from": self.curve.interpolated_from,
            "plan": "greedy" if settings.magcache_thresh is not None else "least error",
            "threshold": settings.magcache_thresh,
            "max_skips": settings.magcache_k,
            "retention": settings.retention_ratio,
            "rule": settings.magcache_rule,
            "joint": self.is_joint,
            "extrapolates": settings.magcache_extrapolate,
            "total_forwards": self.num_forwards,
            "skipped_forwards": skipped,
            "skipped_forwards_apart": apart,
            "residual_bytes": self.num_residuals(self.mesh)
            * memory.residual_bytes(self.spec.dit, -(-self.geometry.tokens // self.mesh.ulysses)),
            "skipped_share": round(skipped / self.num_forwards, 4),
            "distilled_steps": len(self.schedule) - self.curve.num_steps,
            "always_computed": self.always_computed,
            "accumulated_error": round(accumulated_error(self._ratios, self.skips), 5),
            "skips_prompt": [prompt for prompt, _ in self.skips],
            "skips_negative_prompt": [negative_prompt for _, negative_prompt in self.skips],
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON; the .json file beside a video contains this JSON."""
        g, config = self.geometry, self.config
        return {
            "recipe": config.models.recipe,
            "overridden": overridden(config.options(), self.spec.magcache_rule),
            "model": self.spec.name,
            "images": config.video.images,
            "written_prompts": list(config.video.written_prompts),
            "experts": [
                {"option": named.flag, "path": str(named.path), "form": named.header().form, "sha256": sha256}
                for named, sha256 in zip(named_experts(config.models), config.models.expert_sha256, strict=True)
            ],
            "loras": [
                {"option": lora.flag, "file": str(lora.file), "strength": lora.strength, "sha256": lora.sha256}
                for lora in loras_of(config.models)
            ],
            "width": g.width,
            "height": g.height,
            "frames": g.frames,
            "clips": len(config.video.prompts),
            "continued_frames": config.video.continue_from_frames,
            "total_frames": config.video.total_frames,
            "joining_bytes": self.joining_bytes,
            "fps": config.video.fps,
            "duration_s": round(config.video.total_frames / config.video.fps, 3),
            "latent": [g.latent_frames, g.latent_height, g.latent_width],
            "tokens": g.tokens,
            "solver": config.video.solver,
            "shift": config.video.shift,
            "sigmas": config.video.levels,
            "steps": {expert: len(steps) for expert, steps in self.timesteps.items()},
            "timesteps": self.timesteps,
            "guidance": self.guidance,
            "guidance_gate": config.video.guidance_gate,
            "guided_steps": {
                expert: sum(both for of, both in zip(self.experts, self.guided, strict=True) if of == expert)
                for expert in EXPERTS
            },
            "forwards": self.num_forwards,
            "magcache": self.magcache_json(),
            "precision": config.models.precision,
            "attention": config.models.attention,
            "sparsity": self.sparsity_json(),
            "fp8_attention": self.fp8.to_json() if self.fp8 else None,
            "quantize": config.models.quantize,
            "compile": config.models.compile_mode if config.models.compile else None,
            "device": config.ranks.device,
            "mesh": dataclasses.asdict(self.mesh),
            "unguided_mesh": dataclasses.asdict(self.unguided_mesh) if self.regroups else None,
            "dit_fsdp": config.ranks.dit_fsdp,
            "t5_fsdp": config.ranks.t5_fsdp,
            "expert_offload": config.ranks.expert_offload,
            "placement": self.placement,
            "seed": config.video.seed,
            "outputs": [str(path) for path in self.outputs],
            "notes": list(self.notes),
        }


def _extrapolates(config: EffectiveConfig) -> bool:
    return config.skipping is not None and config.skipping.magcache_extrapolate


@lru_cache(maxsize=64)
def _planned_skips(
    ratios: Ratios,
    experts: Sequence[Expert],
    settings: MagCacheSettings,
    wanted: int | None,
    exactly: bool,
    joint: bool,
    guided: Sequence[bool],
    always: Sequence[int],
) -> Sequence[Skips]:
    """Returns the skips by the threshold, or the `wanted` number of skips; planned once for all lines of a list."""
    if wanted is None:
        return plan_skips(ratios, experts, settings, joint=joint, guided=guided, always=always)
    return plan_best(ratios, experts, settings, wanted, exactly=exactly, joint=joint, guided=guided, always=always)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job is one planned video in the form that the parent sends to the ranks."""

    config: EffectiveConfig
    requested: dict[str, Any]  # the options that were given
    notes: tuple[str, ...] = ()
    placement: str = ""
    image_size: tuple[int, int] = (0, 0)  # (width, height) for a warmup, which reads no image

    def clips(self) -> list[Job]:
        """Returns a job for each clip of the video, in order."""
        configs = [dataclasses.replace(self.config, video=video) for video in self.config.video.clips()]
        return [dataclasses.replace(self, config=config) for config in configs]

    def to_json(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "effective": self.config.to_json(),
            "notes": list(self.notes),
            "placement": self.placement,
            "image_size": list(self.image_size),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Job:
        """Makes a job from the JSON that `to_json` returned. Raises ConfigError."""
        return cls(
            config=EffectiveConfig.from_json(document["effective"]),
            requested=document["requested"],
            notes=tuple(document["notes"]),
            placement=document["placement"],
            image_size=tuple(document["image_size"]),
        )


def read_guided(document: dict[str, Any]) -> list[bool]:
    """Reads a plan's JSON and returns for each step whether the negative prompt's branch runs."""
    experts = [expert for expert in EXPERTS for _ in range(document["steps"][expert])]
    return guided_steps(experts, document["guidance"], document.get("guidance_gate", 1.0))


def resolve(
    given: Options, *, writes: bool = True, runs: bool = True, files: ModelFiles | None = None
) -> tuple[Plan, ModelFiles]:
    """Decides the options of a request and checks the files that the options name; `place` decides the mesh later.

    This function runs the program of --extend-prompt. It writes no output, but may store hashes of files in the
    artifacts folder. Raises WanFastError.
    `writes`: whether the run writes output files. If false, the plan has no output files, and the ranks return the
    frames.
    `runs`: whether the plan will be run. If false, an output file that exists gets a note instead of an error.
    `files`: the model's files, if the caller has already located them.
    """
    asked = EffectiveConfig.of(given, A14B)  # refuses values that are wrong for every model
    files = files or model_files.locate_for(asked.models)
    spec = files.spec
    if not all(map(clean_prompt, asked.video.prompts)):
        raise ConfigError("--prompt holds only control characters or spaces: describe what should happen in the video")
    check_images(asked, spec)
    require_distilled(asked.models, spec, files.root)
    earlier = earlier_facts(asked.video.continue_from) if asked.video.continue_from else None
    image, last = (_image_facts(asked.video.images.get(option), option) for option in ("--image", "--last-image"))
    image = earlier or image
    config = effective(given, files, image.sha256, last.sha256, earlier)
    plan = Plan.of(config, spec, image.size, curve=curve_of(config, files), densities=densities_of(config, files))
    if writes:
        _check_outputs(plan, overwrite=config.output.overwrite or not runs)
    else:
        plan = dataclasses.replace(plan, config=dataclasses.replace(config, output=OutputConfig(output=None)))
    plan = _with_extended_prompts(plan)  # last, because the program may take minutes
    notes = (
        *image.notes, *_geometry_notes(plan, image), *_last_image_notes(plan, last), *_prompt_notes(plan, files),
        *magcache_notes(config, files), *expert_notes(config.models), *lora_notes(config.models),
        *_sparsity_notes(plan), *_clip_notes(config.video), *_extension_notes(plan.config.video, config.ranks),
        *_output_notes(plan), *_thread_notes(config.ranks, spec),
    )  # fmt: skip
    notes = (*notes, spec.weights_note) if spec.weights_note else notes
    return dataclasses.replace(plan, requested=given, notes=notes), files


def check_images(config: EffectiveConfig, spec: ModelSpec) -> None:
    """Raises ConfigError if a video has fewer or more images than its model and its recipe need."""
    video, recipe = config.video, config.models.recipe
    num_images = RECIPES[recipe].num_images if recipe else 0
    if not spec.takes_images:
        refuse_image_options([*video.images, *(["--fit"] if video.fit != VideoConfig.fit else [])], spec)
        if num_images:
            raise ConfigError(
                f"--recipe {recipe} is for models that start from an image: use another recipe or --model"
            )
        if len(video.prompts) > 1:
            raise ConfigError(
                f"--prompt is given {len(video.prompts)} times, but {spec.name} makes videos from text alone, so no "
                "clip can start from another clip's frame: give --prompt once, or use --model a14b"
            )
    elif not (video.image or video.continue_from):
        raise ConfigError("--image is missing: give the image that the video starts from")
    if num_images > len(video.images):
        raise ConfigError(
            f"--recipe {recipe} needs a last image, because the recipe's weights are distilled for videos with one: "
            "add --last-image FILE, or use --recipe lightning-4"
        )


def refuse_image_options(flags: Iterable[str], spec: ModelSpec) -> None:
    """Raises ConfigError if the model takes no images, but `flags` names an option that needs an image."""
    if not spec.takes_images and (unusable := next(iter(flags), None)):
        raise ConfigError(f"{unusable}: {spec.name} makes videos from text alone: drop {unusable}, or use --model a14b")


@dataclass(frozen=True)
class _ImageFacts:
    sha256: str
    size: tuple[int, int]
    notes: tuple[str, ...]


@remembered
def _image_facts(path: str | None, option: str) -> _ImageFacts:
    """Returns what a plan needs of an image; a list may name one image a thousand times."""
    if path is None:
        return _ImageFacts("", (0, 0), ())
    image = images.load_image(path, option)
    return _ImageFacts(image.sha256, image.size, image.notes)


@dataclass(frozen=True)
class EarlierFacts(_ImageFacts):
    num_frames: int
    fps: int


@remembered
def earlier_facts(path: str) -> EarlierFacts:
    """Returns what the plan of a new video needs to know about `path`, the video that the new video continues."""
    video = load_earlier(path)
    return EarlierFacts(video.sha256, video.size, video.notes, video.num_frames, video.fps)


@remembered
def _tokenizer(file: Path, max_tokens: int) -> PromptTokenizer:
    return PromptTokenizer(file, max_tokens)


def effective(
    given: Options,
    files: ModelFiles,
    image_sha256: str = "",
    last_image_sha256: str = "",
    earlier: EarlierFacts | None = None,
) -> EffectiveConfig:
    """Completes the given options with the model's defaults; `place` decides the ranks later. Raises ConfigError."""
    device = given.get("device") or default_device()
    answers: dict[str, Any] = {"device": device, "seed": secrets.randbelow(2**31)}
    answers |= {"last_image_sha256": last_image_sha256}
    answers |= _continuing(given, earlier) if earlier else {"image_sha256": image_sha256}
    given = {**given, "num_gpus": _num_gpus(given.get("num_gpus", 1), device, asked="device" in given)}
    config = EffectiveConfig.of(given, files.spec, **answers)
    config = config.replace(**own_loras(config.models, files.root))
    models, size = config.models, "{}x{}".format(*parse_size(config.video.size))
    config = dataclasses.replace(config, models=identified(models), video=dataclasses.replace(config.video, size=size))
    if models.quantize == "fp8-rowwise" and device == "cuda" and (old := _without_float8()):
        raise ConfigError(f"--quantize fp8-rowwise: {old} cannot multiply in float8: use --quantize int8-dynamic")
    if models.attention in LOSSY_ATTENTION and device == "cuda" and (other := _not_hopper()):
        raise ConfigError(f"--attention {models.attention} needs Hopper GPUs, not {other}: use --attention auto")
    if models.tf32 and device == "cpu":
        raise NeedsGpuError("--tf32 needs a GPU: drop --tf32, or use --device cuda")
    return attention_plans.settle(settle(config, files), files)


def _continuing(given: Options, earlier: EarlierFacts) -> dict[str, Any]:
    """Returns the answers that follow from the earlier video. Raises ConfigError if a given option says otherwise."""
    width, height = earlier.size
    size, fps, fit = given.get("size"), given.get("fps") or earlier.fps, given.get("fit") or VideoConfig.fit
    if size is not None and parse_size(size) != earlier.size:
        raise ConfigError(
            f"--size {size}: the video of --continue-from has {width}x{height} pixels, and its continuation must "
            f"have the same size: use --size {width}x{height}, or drop --size"
        )
    if fps != earlier.fps:
        raise ConfigError(
            f"--fps {fps}: the video of --continue-from has {earlier.fps} frames per second, and its "
            f"continuation must have the same rate: use --fps {earlier.fps}, or drop --fps"
        )
    if fit != VideoConfig.fit and not given.get("last_image"):
        raise ConfigError(
            f"--fit {fit}: --continue-from gives no image that must be fitted: drop --fit, or add --last-image"
        )
    facts = {"continue_from_sha256": earlier.sha256, "continue_from_frames": earlier.num_frames}
    return {"size": f"{width}x{height}", "fps": earlier.fps, **facts}


def model_of(given: Options) -> ModelFiles:
    """Refuses values of options that no model accepts, then locates the model's files. Raises WanFastError."""
    return model_files.locate_for(EffectiveConfig.of(given, A14B).models)


def _num_gpus(asked_for: int | Literal["auto"], device: Device, *, asked: bool) -> int:
    """Returns --num-gpus as a number. Raises ConfigError if this machine is known to have fewer GPUs."""
    if device == "cpu":
        if asked_for == "auto":
            raise ConfigError(
                "--num-gpus auto counts GPUs, but this run is on the CPU: give a number of processes"
                f"{why_cpu(asked=asked)}"
            )
        return asked_for
    found = len(gpus.visible_gpus())
    if asked_for == "auto":
        if not found:
            raise ConfigError("--num-gpus auto: no GPU is visible here: give a number")
        return found
    if 0 < found < asked_for:
        raise ConfigError(f"--num-gpus {asked_for}: the number of GPUs here is {found}: use --num-gpus {found} or auto")
    return asked_for


def why_cpu(*, asked: bool) -> str:
    """Returns the reason why a request is planned for the CPU, or "" if the user asked for the CPU."""
    return "" if asked else " (no GPU was found, so the plan is for the CPU; --device cuda plans for GPUs)"


def _without_float8() -> str | None:
    """Returns the name of a GPU that is too old for float8, if there is one."""
    return next((gpu.name for gpu in gpus.visible_gpus() if gpu.capability < _FLOAT8_CAPABILITY), None)


def _not_hopper() -> str | None:
    """Returns the name of a GPU that is not of the Hopper generation, if there is one."""
    return next((gpu.name for gpu in gpus.visible_gpus() if gpu.capability != _HOPPER), None)


def default_device() -> Device:
    """Returns cuda if the driver shows a GPU, else cpu.

    This function does not import torch. If torch finds no GPU later, a rank raises an error.
    """
    return "cuda" if gpus.visible_gpus() else "cpu"


def _check_outputs(plan: Plan, *, overwrite: bool) -> None:
    """Raises ConfigError if a file cannot be written."""
    g, num_frames = plan.geometry, plan.config.video.total_frames
    needed_bytes = (1 << 20) + int(g.width * g.height * num_frames * _MP4_BYTES_PER_PIXEL)
    output = str(plan.config.output.output)
    video_file.check_outputs(output, *plan.outputs[1:], overwrite=overwrite, needed_bytes=needed_bytes)


def _sparsity_notes(plan: Plan) -> list[str]:
    """Returns a note if sparse attention computes all blocks, or more than the density that was asked for."""
    sparsity, asked = plan.sparsity, plan.config.models.density
    if sparsity is None:
        return []
    blocks = f"--attention sparse: the video has {sparsity.num_blocks} blocks of {BLOCK} tokens"
    if sparsity.density == 1:
        return [f"{blocks}, and all of them are computed: this saves no time"]
    if asked is not None and sparsity.density > asked + 1 / sparsity.num_blocks:
        number = sparsity.first_blocks + sparsity.last_blocks + 1
        whose = "the first and last frame's" if sparsity.last_blocks else "the first frame's"
        kept = f"each list must hold at least {number} of them ({whose} and one more)"
        return [f"{blocks}, and {kept}: the density is {sparsity.density:.2f}, not {asked:g}"]
    return []


def _with_extended_prompts(plan: Plan) -> Plan:
    """Returns a plan with the prompts that --extend-prompt gives; without it, the same plan. Raises ConfigError.

    The program gets the image of the first clip only, because the other clips start from frames that do not exist yet.
    It runs on the first machine only, because all machines make the first one's video.
    """
    video = plan.config.video
    command, image = video.extend_prompt, next(iter(video.images.values()), None)
    if command is None or plan.config.ranks.node_rank > 0:
        return plan
    first, *others = video.prompts
    prompts = (extended(command, first, image), *(extended(command, other, None) for other in others))
    return dataclasses.replace(plan, config=plan.config.replace(prompt=prompts, written_prompts=video.prompts))


def _extension_notes(video: VideoConfig, ranks: RanksConfig) -> list[str]:
    if video.extend_prompt and ranks.node_rank > 0:
        return ["--extend-prompt: the program runs on machine 0, and all machines use the prompt that it prints"]
    return [f"--extend-prompt: the prompt is {text!r:.300}" for text in video.prompts if video.extend_prompt]


def _clip_notes(video: VideoConfig) -> list[str]:
    """Returns a note on the limits of clips that start from the last frame of the one before."""
    if not video.continue_from and len(video.prompts) == 1:
        return []
    return [
        "a clip gets only the last frame of what comes before it: motion may change suddenly where clips join, and "
        "colours may drift from clip to clip"
    ]


def _output_notes(plan: Plan) -> list[str]:
    """Returns a note if a run of the plan would be refused because a file exists."""
    existing = [] if plan.config.output.overwrite else [path for path in plan.outputs if os.path.lexists(path)]
    return [f"a run would be refused, because {path} exists: add --overwrite" for path in existing[:1]]


def _thread_notes(ranks: RanksConfig, spec: ModelSpec) -> list[str]:
    """Returns a note if OMP_NUM_THREADS gives a process on a CPU more threads than wanfast would, or far fewer."""
    threads, own = os.environ.get(host.THREADS, "").strip(), host.own_threads(spec.dit.dim, ranks.num_gpus)
    if ranks.device != "cpu" or not threads.isdecimal() or own / 2 < int(threads) <= own:
        return []
    why = "threads wait for each other if other programs use the cores too" if int(threads) > own else "cores stay idle"
    return [
        f"{host.THREADS}={threads} sets the threads of a process to {threads} instead of {own}, and {why}: a video may "
        f"take several times as long; unset {host.THREADS} to avoid this"
    ]


def _geometry_notes(plan: Plan, image: _ImageFacts) -> list[str]:
    g, spec, (image_width, image_height) = plan.geometry, plan.spec, image.size
    width, height = parse_size(plan.config.video.size)
    notes = _fit_notes(plan.config.video.fit, g, image.size, (width, height)) if spec.takes_images else []
    if image_width * image_height > 16 * g.width * g.height:
        notes.append(
            "the image has over 16 times as many pixels as the video: if the video shimmers, shrink the image first"
        )
    if spec.shift_480p and width * height <= 832 * 480 and plan.config.video.shift == spec.shift:
        notes.append(
            f"at 480p the model's publisher advises --shift {spec.shift_480p}; this run uses {plan.config.video.shift}"
        )
    if spec.trained_frames and g.frames > spec.trained_frames:
        notes.append(
            f"the model was trained on {spec.trained_frames} frames: a longer video may repeat itself or lose quality; "
            f"--frames {spec.trained_frames} avoids this"
        )
    return notes


def _last_image_notes(plan: Plan, last: _ImageFacts) -> list[str]:
    """Returns the notes on the last image, such as that it is stretched to the shape of the video."""
    notes = [f"--last-image: {note}" for note in last.notes]
    video, g = plan.config.video, plan.geometry
    if video.last_image is None:
        return notes
    if video.fit != "area":
        return notes + [f"--last-image: {note}" for note in _fit_notes(video.fit, g, last.size, (g.width, g.height))]
    width, height = inner_size(last.size, g.width, g.height)
    if (g.width - width) * g.height + (g.height - height) * g.width > _MOST_STRETCH * g.width * g.height:
        notes.append(
            f"--last-image: the {last.size[0]}x{last.size[1]} image is stretched to {g.width}x{g.height}, because its "
            "shape is not the first image's: add --fit crop or --fit pad"
        )
    return notes


def _fit_notes(fit: ImageFit, g: Geometry, image_size: tuple[int, int], size: tuple[int, int]) -> list[str]:
    (image_width, image_height), (width, height) = image_size, size
    if fit == "area" and (g.width, g.height) != size:
        return [
            f"the video is {g.width}x{g.height}, not {width}x{height}: --size gives only the area, and the shape "
            f"follows the {image_width}x{image_height} image, in multiples of 16; for exactly {width}x{height} add "
            "--fit crop or --fit pad"
        ]
    left, top, right, bottom = middle_box(image_size, width, height)
    if fit == "crop" and (right - left, bottom - top) != image_size:
        return [
            f"--fit crop: the video shows the middle {right - left}x{bottom - top} of the "
            f"{image_width}x{image_height} image"
        ]
    inner_width, inner_height = inner_size(image_size, width, height)
    if fit == "pad" and (inner_width, inner_height) != size:
        return [
            f"--fit pad: the image fills {inner_width}x{inner_height} of the {width}x{height} video; the rest is black"
        ]
    return []


def _prompt_notes(plan: Plan, files: ModelFiles) -> list[str]:
    if not files.exists:
        return ["the weights are missing, so the prompt's tokens were not counted"]
    tokenizer = _tokenizer(files.tokenizer, plan.spec.dit.text_len)
    notes = []
    prompts = [("--prompt", prompt) for prompt in plan.config.video.prompts]
    for option, text in (*prompts, ("--negative-prompt", plan.config.video.negative_prompt)):
        tokens = tokenizer.encode(text)
        if tokens.truncated:
            notes.append(
                f"{option} is {tokens.num_tokens_before_truncation} tokens long: "
                f"the model reads the first {plan.spec.dit.text_len}; the rest has no effect"
            )
    return notes
