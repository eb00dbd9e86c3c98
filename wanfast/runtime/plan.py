"""From a request to a plan: every question answered, every file checked, nothing computed yet. Torch-free.

`resolve` turns what was asked into what will run; `Plan.of` derives from that, and from the model's facts alone, the
grids, the schedule and the share of each expert. Parent and worker derive the same plan from the same effective config,
so what was printed is what runs.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wanfast.runtime import gpus, media_io, memory, model_files
from wanfast.runtime.config import Device, EffectiveConfig, Expert, GenerateConfig, from_options, parse_size
from wanfast.runtime.distributed.mesh import Mesh
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.magcache_curves import Curve, curve_of, magcache_notes, settle
from wanfast.runtime.media_io import LoadedImage
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.model_spec import ModelSpec
from wanfast.runtime.sampling.guidance import needs_unconditional
from wanfast.runtime.sampling.magcache import MagCacheSettings, Skips, accumulated_error, plan_best, plan_skips
from wanfast.runtime.sampling.scheduler import Step, expert_of, schedule
from wanfast.runtime.shapes import Geometry, fit_geometry
from wanfast.runtime.tokenizer import PromptTokenizer, clean_prompt

_FLOAT8_CAPABILITY = (8, 9)
_MP4_BYTES_PER_PIXEL = 0.25  # generous at CRF 10: a rough video takes about half


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run, in full."""

    config: EffectiveConfig
    spec: ModelSpec
    geometry: Geometry
    schedule: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    placement: str = ""  # why the weights lie where they lie
    curve: Curve | None = None  # by which forwards are skipped
    residuals_a_branch: int = 0  # kept from step to step

    @classmethod
    def of(
        cls,
        config: EffectiveConfig,
        spec: ModelSpec,
        image_size: tuple[int, int],
        notes: tuple[str, ...] = (),
        placement: str = "",
        curve: Curve | None = None,
    ) -> Plan:
        return cls(
            config=config,
            spec=spec,
            geometry=fit_geometry(spec, *parse_size(config.size), config.frames, image_size),
            schedule=schedule(config.solver, config.steps, config.shift),
            notes=notes,
            placement=placement,
            curve=curve,
            residuals_a_branch=0 if curve is None else 1,
        )

    def job(self, requested: dict[str, Any]) -> Job:
        """What the ranks need to know; `requested`: the options that were given."""
        return Job(config=self.config, requested=requested, notes=self.notes, placement=self.placement)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The video, its JSON and, if asked for, its contact sheet."""
        return output_paths(self.config.output, self.config.contact_sheet)

    @property
    def mesh(self) -> Mesh:
        config = self.config
        mesh = Mesh(cfg=config.cfg_parallel, ulysses=config.ulysses)
        return dataclasses.replace(mesh, replica=config.num_gpus * config.nnodes // mesh.group_size)

    @property
    def guidance(self) -> dict[Expert, float]:
        return {"high_noise": self.config.guidance_high_noise, "low_noise": self.config.guidance_low_noise}

    @property
    def timesteps(self) -> dict[Expert, list[int]]:
        """The timesteps of each expert, in order."""
        split: dict[Expert, list[int]] = {"high_noise": [], "low_noise": []}
        for expert, step in zip(self.experts, self.schedule, strict=True):
            split[expert].append(step.timestep)
        return split

    @property
    def num_forwards(self) -> int:
        """Passes through an expert: two a step where guidance needs the negative prompt."""
        return sum(1 + both for both in self._guided)

    @property
    def experts(self) -> list[Expert]:
        """At work in each step."""
        return [expert_of(step.timestep, self.spec.boundary) for step in self.schedule]

    @property
    def _guided(self) -> list[bool]:
        """Whether a step has a branch of the negative prompt."""
        return [needs_unconditional(self.guidance[expert]) for expert in self.experts]

    @property
    def is_joint(self) -> bool:
        """Whether both branches skip together: if either waited for the other, half of the ranks would idle."""
        asked = self.config.magcache_joint
        return asked == "on" or (asked == "auto" and self.config.cfg_parallel == 2)

    @cached_property
    def skips(self) -> list[Skips]:
        """The forwards that MagCache skips, of each step and branch. Raises ConfigError if a budget cannot be met."""
        return self._skips(joint=self.is_joint)

    def _skips(self, *, joint: bool) -> list[Skips]:
        if self.curve is None:
            return [(False, False)] * len(self.schedule)
        config, ratios, guided = self.config, self.curve.ratios, self._guided
        assert config.magcache_k is not None and config.retention_ratio is not None and config.magcache_rule is not None
        threshold = config.magcache_thresh or 0.0  # of a budget there is none
        settings = MagCacheSettings(threshold, config.magcache_k, config.retention_ratio, config.magcache_rule)
        if config.magcache_thresh is not None:
            return plan_skips(ratios, self.experts, settings, joint=joint, guided=guided)
        option, wanted = f"--magcache-skip {config.magcache_skip}", config.magcache_skip
        if wanted is None:
            budget = config.magcache_budget or 0.0
            option, wanted = f"--magcache-budget {budget:g}", int((1 - budget) * self.num_forwards + 1e-9)
        exactly = config.magcache_skip is not None
        try:
            return plan_best(ratios, self.experts, settings, wanted, exactly=exactly, joint=joint, guided=guided)
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None

    def num_residuals(self, mesh: Mesh) -> int:
        """That a rank of `mesh` keeps, of the branches that it works on."""
        return self.residuals_a_branch * (2 if any(self._guided) and mesh.cfg == 1 else 1)

    def magcache_json(self) -> dict[str, Any] | None:
        """What is skipped, by what, and how much it is; None if nothing is to be."""
        if self.curve is None:
            return None
        config, skipped = self.config, sum(map(sum, self.skips))
        apart = sum(map(sum, self._skips(joint=False))) if self.is_joint and config.magcache_skip is None else None
        return {
            "curve": self.curve.name,
            "interpolated_from": self.curve.interpolated_from,
            "plan": "greedy" if config.magcache_thresh is not None else "least error",
            "threshold": config.magcache_thresh,
            "max_skips": config.magcache_k,
            "retention": config.retention_ratio,
            "rule": config.magcache_rule,
            "joint": self.is_joint,
            "total_forwards": self.num_forwards,
            "skipped_forwards": skipped,
            "skipped_forwards_apart": apart,
            "residual_bytes": self.num_residuals(self.mesh)
            * memory.residual_bytes(self.spec.dit, -(-self.geometry.tokens // self.mesh.ulysses)),
            "skipped_share": round(skipped / self.num_forwards, 4),
            "accumulated_error": round(accumulated_error(self.curve.ratios, self.skips), 5),
            "skips_prompt": [prompt for prompt, _ in self.skips],
            "skips_negative_prompt": [negative_prompt for _, negative_prompt in self.skips],
        }

    def to_json(self) -> dict[str, Any]:
        g, config = self.geometry, self.config
        return {
            "model": self.spec.name,
            "width": g.width,
            "height": g.height,
            "frames": g.frames,
            "fps": config.fps,
            "duration_s": round(g.frames / config.fps, 3),
            "latent": [g.latent_frames, g.latent_height, g.latent_width],
            "tokens": g.tokens,
            "solver": config.solver,
            "shift": config.shift,
            "steps": {expert: len(steps) for expert, steps in self.timesteps.items()},
            "timesteps": self.timesteps,
            "guidance": self.guidance,
            "forwards": self.num_forwards,
            "magcache": self.magcache_json(),
            "precision": config.precision,
            "attention": config.attention,
            "quantize": config.quantize,
            "compile": config.compile_mode if config.compile else None,
            "device": config.device,
            "mesh": dataclasses.asdict(self.mesh),
            "dit_fsdp": config.dit_fsdp,
            "t5_fsdp": config.t5_fsdp,
            "expert_offload": config.expert_offload,
            "placement": self.placement,
            "seed": config.seed,
            "outputs": [str(path) for path in self.outputs],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """One planned video, in the form in which it goes from the parent to the ranks."""

    config: EffectiveConfig
    requested: dict[str, Any]  # the options that were given
    notes: tuple[str, ...] = ()
    placement: str = ""
    image_size: tuple[int, int] = (0, 0)  # (width, height) for a warmup, which reads no image

    def to_json(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "effective": dataclasses.asdict(self.config),
            "notes": list(self.notes),
            "placement": self.placement,
            "image_size": list(self.image_size),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Job:
        """The inverse of `to_json`. Raises ConfigError."""
        return cls(
            config=from_options(EffectiveConfig, document["effective"]),
            requested=document["requested"],
            notes=tuple(document["notes"]),
            placement=document["placement"],
            image_size=tuple(document["image_size"]),
        )


def guided_steps(document: dict[str, Any]) -> list[bool]:
    """Of a plan's JSON: whether each step has a branch of the negative prompt."""
    return [
        needs_unconditional(document["guidance"][expert])
        for expert in ("high_noise", "low_noise")
        for _ in range(document["steps"][expert])
    ]


def resolve(request: GenerateConfig) -> tuple[Plan, ModelFiles]:
    """Answer every open question of a request and check its files. Raises WanFastError; writes nothing."""
    files = model_files.locate(request.model, request.artifacts_dir)
    spec = files.spec
    if not clean_prompt(request.prompt or ""):
        raise ConfigError("--prompt holds only control characters or spaces: say what should happen in the video")
    image = media_io.load_image(request.image or "")
    config = effective(request, files, image.sha256)
    plan = Plan.of(config, spec, image.size, curve=curve_of(config, files))
    _check_outputs(plan, request)
    notes = (
        *image.notes, *_geometry_notes(plan, image), *_prompt_notes(plan, files), *magcache_notes(config, files)
    )  # fmt: skip
    return dataclasses.replace(plan, notes=(*notes, spec.weights_note) if spec.weights_note else notes), files


def effective(request: GenerateConfig, files: ModelFiles, image_sha256: str) -> EffectiveConfig:
    """The request with the model's own answers filled in; who does it is `placement`'s to say. Raises ConfigError."""
    spec = files.spec
    config = EffectiveConfig(
        model=request.model if request.model in ("tiny", "a14b") else str(files.root),
        image=str(Path(request.image or "").absolute()),
        image_sha256=image_sha256,
        prompt=request.prompt or "",
        negative_prompt=_or(request.negative_prompt, spec.negative_prompt),
        size="{}x{}".format(*parse_size(_or(request.size, spec.size))),
        frames=_or(request.frames, spec.frames),
        steps=_or(request.steps, spec.steps),
        shift=float(_or(request.shift, spec.shift)),
        guidance_high_noise=float(_or(request.guidance_high_noise, spec.guidance_high_noise)),
        guidance_low_noise=float(_or(request.guidance_low_noise, spec.guidance_low_noise)),
        solver=request.solver,
        seed=_or(request.seed, secrets.randbelow(2**31)),
        noise_device=request.noise_device,
        fps=_or(request.fps, spec.fps),
        precision=request.precision,
        attention=request.attention,
        quantize=request.quantize,
        quantize_on_the_fly=request.quantize_on_the_fly,
        verify=request.verify,
        tf32=request.tf32,
        compile=request.compile,
        compile_mode=request.compile_mode,
        device=request.device or default_device(),
        output=str(Path(request.output).absolute()),
        overwrite=request.overwrite,
        contact_sheet=request.contact_sheet,
        artifacts_dir=str(Path(request.artifacts_dir).absolute()),
    )
    if config.noise_device == "cuda" and config.device == "cpu":
        raise ConfigError("--noise-device cuda needs a GPU: drop it, and the noise is drawn on the CPU")
    if config.quantize == "fp8-rowwise" and config.device == "cuda" and (old := _without_float8()):
        raise ConfigError(f"--quantize fp8-rowwise: {old} has no float8 products: take int8-dynamic")
    if config.tf32 and config.device == "cpu":
        raise ConfigError("--tf32 is of GPUs: drop it, or take --device cuda")
    return settle(request, config, files)


def _without_float8() -> str | None:
    """The name of a GPU that is too old for it, if there is one."""
    return next((gpu.name for gpu in gpus.visible_gpus() if gpu.capability < _FLOAT8_CAPABILITY), None)


def default_device() -> Device:
    """cuda where the driver shows a GPU, without asking torch; the worker refuses if torch then sees none."""
    return "cuda" if gpus.visible_gpus() else "cpu"


def output_paths(output: str, contact_sheet: bool) -> tuple[Path, ...]:
    video = Path(output)
    suffixes = (".json", ".png") if contact_sheet else (".json",)
    return (video, *(video.with_suffix(suffix) for suffix in suffixes))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_outputs(plan: Plan, request: GenerateConfig) -> None:
    g = plan.geometry
    needed_bytes = (1 << 20) + int(g.width * g.height * g.frames * _MP4_BYTES_PER_PIXEL)
    media_io.check_output(request.output, overwrite=request.overwrite, needed_bytes=needed_bytes)
    for path in plan.outputs[1:]:
        if path.exists() and not request.overwrite:
            raise ConfigError(
                f"--output: {path}, which goes beside the video, exists: add --overwrite, or name another"
            )


def _geometry_notes(plan: Plan, image: LoadedImage) -> list[str]:
    g, spec, (image_width, image_height) = plan.geometry, plan.spec, image.size
    width, height = parse_size(plan.config.size)
    notes = []
    if (g.width, g.height) != (width, height):
        notes.append(
            f"{g.width}x{g.height}, not {width}x{height}: --size gives the area, and the image's shape ({image_width}x"
            f"{image_height}) is kept within it, rounded down to multiples of 16 as the model's makers do"
        )
    if image_width * image_height > 16 * g.width * g.height:
        notes.append(
            "the image is over four times the video's size and is sampled as it is: shrink it first if it shimmers"
        )
    if spec.shift_480p and width * height <= 832 * 480 and plan.config.shift == spec.shift:
        notes.append(f"at 480p the model's makers advise --shift {spec.shift_480p}; this run takes {plan.config.shift}")
    return notes


def _prompt_notes(plan: Plan, files: ModelFiles) -> list[str]:
    if not files.exists:
        return ["the weights are not there yet, so the prompt's tokens were not counted"]
    tokenizer = PromptTokenizer(files.tokenizer, plan.spec.dit.text_len)
    notes = []
    for option, text in (("--prompt", plan.config.prompt), ("--negative-prompt", plan.config.negative_prompt)):
        tokens = tokenizer.encode(text)
        if tokens.truncated:
            notes.append(
                f"{option} is {tokens.num_tokens_before_truncation} tokens long: "
                f"the model reads the first {plan.spec.dit.text_len}, the rest has no effect"
            )
    return notes
