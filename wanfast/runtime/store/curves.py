"""Finds MagCache's ratios: a model's preset, or a curve that `wanfast calibrate-magcache` stored.

A preset is a curve that ships with the package. The key of a stored curve holds all inputs of its measurement, in two
groups. The inputs of the first group must be equal in the measurement and in a run: both experts and their LoRAs; the
facts, the precision, the scheme and TF32; the steps, the shift, the solver and the guidance; the size, the frames and
whether there is a last image. If an input of the first group differs, the run refuses the curve, and the error names
the command that measures a new curve. With `--magcache-interpolate`, the steps and the shift may differ, because the
ratios change smoothly.
The inputs of the second group change a ratio only a little, and may differ: the set of clips, the VAE, UMT5, the
negative prompt, the attention kernel, --compile, the code, the libraries and the device.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wanfast.runtime.config import (
    EffectiveConfig,
    ModelsConfig,
    SkippingConfig,
    VideoConfig,
    default_artifacts_dir,
    magcache_settings,
)
from wanfast.runtime.config.option import options_of, words
from wanfast.runtime.config.recipes import RECIPES, without_lossy_attention
from wanfast.runtime.config.skipping import default_rule
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from wanfast.runtime.facts.choices import EXPERTS, LOSSY_ATTENTION, Command, Expert, in_8_bits
from wanfast.runtime.facts.model_spec import A14B, PUBLISHED, ModelSpec
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.machine.packages import version_of
from wanfast.runtime.sampling.magcache import resample
from wanfast.runtime.sampling.scheduler import Levels, grid, listed
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.loras import inputs_of, loras_of
from wanfast.runtime.store.model_files import ModelFiles

T = TypeVar("T")
_Found = tuple[
    dict[str, tuple[Any, Any]], dict[str, Any], Path
]  # what differs from the run, the curve's inputs, folder

KIND = "magcache"
RATIOS = "ratios.json"
_PRESETS = Path(__file__).parents[2] / "assets" / "magcache"
_BRIDGED = {"steps", "shift"}
_NOT_COMPARED = ("set", "measured_by")
# From the picture and the weights to a residual, and from residuals to ratios.
_CODE = (
    "runtime/media/*.py", "runtime/store/expert_files.py", "runtime/weights/*.py", "runtime/models/*.py",
    "runtime/sampling/*.py",
    "runtime/engine/*.py", "runtime/device/*.py", "runtime/distributed/*.py", "magcache_calib/*.py",
)  # fmt: skip
_DEFAULTS = (0.12, 2, 0.2)  # of the published matrix: threshold, skips in a row, share retained


@dataclass(frozen=True)
class Curve:
    """This class holds the ratios of each step of a run, and the name of their source."""

    name: str  # "preset", or the key of an artifact
    ratios: tuple[tuple[float, float], ...]
    interpolated_from: dict[str, Any] | None = None  # the curve's steps and shift, if not the run's

    @property
    def num_steps(self) -> int:
        """Returns the number of steps for which the curve has ratios, counted from the first step of a run."""
        return len(self.ratios)


def settle(config: EffectiveConfig, files: ModelFiles) -> EffectiveConfig:
    """Returns the config with the defaults of MagCache's options filled in.

    In the result, --magcache is "preset" or the key of a stored curve. If --magcache is off, the config is returned
    unchanged. Raises WanFastError.
    """
    asked = config.skipping
    if asked is None:
        return config
    short = magcache_settings(asked.magcache)
    threshold, max_skips, retention = short or _DEFAULTS
    by_budget = asked.magcache_budget is not None or asked.magcache_skip is not None
    is_list = config.video.levels is not None
    if is_list and not short and asked.magcache != "preset":
        raise ConfigError(
            f"--magcache {asked.magcache} and {levels_option(config)} exclude each other, because a stored curve is "
            "measured with --steps and --shift: use --magcache preset, or drop --magcache"
        )
    if is_list and asked.magcache_interpolate:
        raise ConfigError(
            f"--magcache-interpolate and {levels_option(config)} exclude each other, because a curve is interpolated "
            "only to --steps and --shift: drop --magcache-interpolate"
        )
    answered = dataclasses.replace(
        asked,
        magcache="preset" if short else asked.magcache,
        magcache_thresh=None if by_budget else _or(asked.magcache_thresh, threshold),
        magcache_k=_or(asked.magcache_k, max_skips),
        retention_ratio=_or(asked.retention_ratio, retention),
        magcache_rule=asked.magcache_rule or default_rule(config.options(), files.spec.magcache_rule),
    )
    config = dataclasses.replace(config, skipping=answered)
    if answered.magcache == "preset":
        _refuse_last_image(config, asked.magcache, files)
        return config
    folder, _ = _artifact(config, answered, files)
    return dataclasses.replace(config, skipping=dataclasses.replace(answered, magcache=folder.name))


def _refuse_last_image(config: EffectiveConfig, magcache: str, files: ModelFiles) -> None:
    """Raises ConfigError if the run has a last image; `magcache`: the value of --magcache that asks for the preset."""
    if config.video.last_image is None:
        return
    recipe = config.models.recipe
    is_of_recipe = recipe is not None and RECIPES[recipe].options.get("magcache") == magcache
    option = f"--recipe {recipe}" if is_of_recipe else f"--magcache {magcache}"
    fix = "use --magcache off"
    if config.video.levels is None:
        command = calibrate_command(config, files.spec)
        lines = "where each line of FOLDER/clips.jsonl names a last_image"
        fix = f"run `{command}`, {lines}, then use --magcache artifact; or {fix}"
    raise ConfigError(f"{option}: no curve ships for videos with --last-image: {fix}")


def levels_option(config: EffectiveConfig) -> str:
    """Returns the option that gives a run its list of noise levels: --sigmas, or --recipe with the recipe's name."""
    recipe = config.models.recipe
    is_of_recipe = recipe is not None and config.video.sigmas == RECIPES[recipe].options.get("sigmas")
    return f"--recipe {recipe}" if is_of_recipe else "--sigmas"


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def curve_of(config: EffectiveConfig, files: ModelFiles) -> Curve | None:
    """Returns the curve for the steps of this run, or None if --magcache is off; raises WanFastError."""
    if config.skipping is None:
        return None
    if config.skipping.magcache == "preset":
        found = preset(files)
        if found is None:
            fix = f"run `{calibrate_command(config, files.spec)}`, and then this command with --magcache artifact"
            if config.video.levels is not None:
                fix = "drop --magcache"
            raise ConfigError(f"--magcache preset: no curve ships for these weights ({files.spec.name}): {fix}")
        return _fitted("preset", found, config, files.spec)
    folder, inputs = _artifact(config, config.skipping, files)
    ratios = read_object(folder / RATIOS, "remove its folder, and run `wanfast calibrate-magcache`").get("ratios")
    return _fitted(folder.name, inputs | {"ratios": ratios}, config, files.spec)


def preset(files: ModelFiles) -> dict[str, Any] | None:
    """Returns the JSON document of the curve that ships for a model, or None if no curve ships.

    If a published model with the same sizes and boundary has a curve, this curve is returned, even if the weights
    differ. Otherwise, a curve is returned only if it was measured with exactly the weights of `files`.
    The document holds the `ratios`, and the steps, the shift, the solver and the boundary of their measurement.
    """
    if (published := _published_with_sizes_of(files.spec)) and _published_file(published).exists():
        return published_curve(published)
    for file in sorted(_PRESETS.glob("*.json")):
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if files.exists and document.get("experts") == _experts(files):
            return document
    return None


def _published_with_sizes_of(spec: ModelSpec) -> ModelSpec | None:
    sizes = spec.dit, spec.boundary
    return next((known for known in PUBLISHED.values() if (known.dit, known.boundary) == sizes), None)


def published_curve(spec: ModelSpec = A14B) -> dict[str, Any]:
    """Returns, as a JSON document, the curve that MagCache's authors published for a published model."""
    document: dict[str, Any] = json.loads(_published_file(spec).read_text(encoding="utf-8"))
    return document


def _published_file(spec: ModelSpec) -> Path:
    return _PRESETS / f"{spec.name.lower()}.json"


def magcache_notes(config: EffectiveConfig, files: ModelFiles) -> list[str]:
    """Returns a note if the weights or the precision of the run differ from those of the preset's measurement."""
    if config.skipping is None or config.skipping.magcache != "preset":
        return []
    published = _published_with_sizes_of(files.spec)
    is_like = published is None or files.spec.name in (published.name, f"{published.name}-Diffusers")
    others = [] if is_like or published is None else [f"the weights of {published.name}"]
    kind = config.models.quantize or config.models.precision
    others += [] if kind == "bf16" else [f"bf16, not {kind}"]
    curve, loras, models = curve_of(config, files), loras_of(config.models), config.models
    steps = steps_of_video(config.video, files.spec.boundary)[: curve.num_steps if curve else 0]
    experts = {expert for expert, _ in steps}  # whose steps may be skipped
    others += ["the published experts"] if any(getattr(models, f"{expert}_expert") for expert in experts) else []
    others += ["no LoRA"] if any(lora.has_expert(expert) for lora in loras for expert in experts) else []
    if not others:
        return []
    own = f"for a curve of this run, run `{calibrate_command(config, files.spec)}`, and then this command with "
    fix = "" if config.video.levels is not None else f"; {own}--magcache artifact"
    return [f"--magcache preset: its curve was measured with {' and '.join(others)}{fix}"]


def _loras(models: ModelsConfig) -> Mapping[Expert, Any] | None:
    """Returns the LoRAs of each expert; None without LoRAs, as in curves of earlier versions."""
    found = {expert: inputs_of(loras_of(models), expert) for expert in EXPERTS}
    return found if any(found.values()) else None


def _experts(files: ModelFiles) -> dict[str, str]:
    return {name: files.fingerprint(name) for name in EXPERTS}


def _fitted(name: str, of: dict[str, Any], config: EffectiveConfig, spec: ModelSpec) -> Curve:
    ratios = _pairs(name, of)
    known = steps_of(of["solver"], of["steps"], of["shift"], spec.boundary)
    wanted = steps_of_video(config.video, spec.boundary)
    if config.video.levels is not None:
        return _of_base_part(Curve(name, tuple(ratios)), of, known, wanted, config)
    assert config.video.shift is not None
    if known == wanted and of["solver"] == config.video.solver:
        return Curve(name, tuple(ratios))
    if not (config.skipping and config.skipping.magcache_interpolate) or of["solver"] != config.video.solver:
        measured = f"{of['steps']} steps with {of['solver']} at shift {of['shift']:g}"
        bridge = "add --magcache-interpolate, or " if of["solver"] == config.video.solver else ""
        asked = f"{config.video.steps} steps with {config.video.solver} at shift {config.video.shift:g}"
        raise ConfigError(
            f"--magcache {name}: the curve is for {measured}, but this run has {asked}: {bridge}run "
            f"`{calibrate_command(config, spec)}` and then this command with --magcache artifact"
        )
    try:
        bridged = resample(ratios, known, wanted)
    except ConfigError as error:
        fix = f"run `{calibrate_command(config, spec)}`"
        raise ConfigError(f"--magcache-interpolate: {error}: {fix}") from None
    return Curve(name, tuple(bridged), {"steps": of["steps"], "shift": of["shift"]})


def _of_base_part(
    curve: Curve,
    of: dict[str, Any],
    known: list[tuple[Expert, int]],
    wanted: list[tuple[Expert, int]],
    config: EffectiveConfig,
) -> Curve:
    """Returns a curve for the first steps of a list of noise levels, as far as these are the curve's own steps.

    The other steps are distilled, so that the curve says nothing of them. Raises ConfigError if no two steps remain.
    """
    pairs = zip(known, wanted, strict=False)
    num_base = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
    solver, skipping = config.video.solver, config.skipping
    if num_base < 2 or of["solver"] != solver.removesuffix("-euler"):
        raise ConfigError(
            f"--magcache {curve.name}: its curve ({of['steps']} steps with {of['solver']} at shift {of['shift']:g}) "
            f"does not fit the steps of {levels_option(config)} with --solver {solver}, so that no step can be "
            "skipped: drop --magcache"
        )
    if skipping and skipping.magcache_rule == "low-noise-only" and wanted[num_base - 1][0] == "high_noise":
        raise ConfigError(
            "--magcache-rule low-noise-only: no step can be skipped, because the steps of the low-noise expert are "
            "distilled: use --magcache-rule both-experts"
        )
    return Curve(curve.name, curve.ratios[:num_base])


def _pairs(name: str, of: dict[str, Any]) -> list[tuple[float, float]]:
    """Returns a curve's ratios of each step. Raises CorruptArtifactError if one cannot be a ratio of norms."""
    rows = of["ratios"] if isinstance(of["ratios"], list) else []
    pairs = [tuple(row) for row in rows if isinstance(row, list) and len(row) == 2 and all(map(_is_ratio, row))]
    if len(pairs) != of["steps"] or len(rows) != of["steps"]:
        raise CorruptArtifactError(
            f"--magcache {name}: the curve does not hold two positive numbers for each of {of['steps']} steps: "
            f"remove the folder {KIND}/{name} in the artifacts folder, and run `wanfast calibrate-magcache`"
        )
    return [(float(prompt), float(negative_prompt)) for prompt, negative_prompt in pairs]


def _is_ratio(value: object) -> bool:
    return type(value) in (int, float) and 1e-6 <= value <= 1e6  # type: ignore[operator]  # false for NaN


def steps_of(solver: Any, steps: int, shift: float, boundary: float) -> list[tuple[Expert, int]]:
    """Returns (active expert, timestep) of each step of the solver's grid with `steps` steps and this `shift`.

    `boundary`: the noise level from 0 to 1 at or above which the high-noise expert is active.
    """
    levels = grid(solver, steps, shift)
    return list(zip(levels.experts(boundary), levels.timesteps, strict=True))


def levels_of(video: VideoConfig) -> Levels:
    """Returns the noise levels of a video: those of --sigmas, or the solver's grid."""
    if video.levels is not None:
        return listed(video.solver, video.levels)
    assert video.steps is not None and video.shift is not None
    return grid(video.solver, video.steps, video.shift)


def steps_of_video(video: VideoConfig, boundary: float) -> list[tuple[Expert, int]]:
    """Returns (active expert, timestep) of each step of a video."""
    levels = levels_of(video)
    return list(zip(levels.experts(boundary, video.switch_step), levels.timesteps, strict=True))


def curve_inputs(config: EffectiveConfig, files: ModelFiles, set_digest: str) -> dict[str, Any]:
    """Returns the inputs from which the key of this run's curve is computed.

    `set_digest`: the digest of the clips by which the curve is measured. Raises MissingArtifactError if weights are
    missing.
    """
    return {
        "experts": _experts(files),
        "loras": _loras(config.models),
        "facts": files.spec.dit.to_json(),
        "boundary": files.spec.boundary,
        "precision": config.models.precision,
        "quantize": config.models.quantize,
        "solver": config.video.solver,
        "steps": config.video.steps,
        "shift": config.video.shift,
        "guidance": {"high_noise": config.video.guidance_high_noise, "low_noise": config.video.guidance_low_noise},
        "size": config.video.size,
        "frames": config.video.frames,
        "tf32": bool(config.models.tf32),
        "last_image": True if config.video.last_image else None,  # None: as in curves of earlier versions
        "set": set_digest,
        "measured_by": _measured_by(config, files),
    }


def _measured_by(config: EffectiveConfig, files: ModelFiles) -> dict[str, Any]:
    """Returns the inputs that change a ratio by less than the difference between the ratios of two tokens.

    These inputs belong to the key, so that a new measurement is stored beside the old one. A run may use either. The
    GPU's name and the mesh are no inputs, because they only change how a ratio is rounded.
    """
    spec = files.spec
    return {
        "conditioning": {name: files.fingerprints[name] for name in ("vae", "umt5", "tokenizer")},
        "facts": {"vae": spec.vae.to_json(), "umt5": spec.umt5.to_json()},
        "negative_prompt": config.video.negative_prompt,
        "attention": config.models.attention,
        "compile": config.models.compile,
        "device": config.ranks.device,
        "torch": version_of("torch"),
        "torchao": version_of("torchao") if in_8_bits(config.models.quantize) else None,
        "code": digest_of_code(*_CODE),
    }


def _artifact(config: EffectiveConfig, asked: SkippingConfig, files: ModelFiles) -> tuple[Path, dict[str, Any]]:
    """Returns the folder and inputs of the curve that was calibrated for this run, or whose key `asked` names."""
    wanted = json.dumps(curve_inputs(config, files, ""))
    fix = f"run `{calibrate_command(config, files.spec)}`"
    return _found(config.models.artifacts_dir, asked.magcache, asked.magcache_interpolate, wanted, fix)


@remembered
def _found(
    artifacts_dir: str, magcache: str, interpolate: bool, inputs_json: str, fix: str
) -> tuple[Path, dict[str, Any]]:
    """Returns the folder and inputs of a curve, verified; a list asks once for each curve that its lines need."""
    store, option = ArtifactStore(Path(artifacts_dir)), f"--magcache {magcache}"
    wanted: dict[str, Any] = json.loads(inputs_json)
    bridged = _BRIDGED if interpolate else set()
    stored = [(folder, inputs) for folder, inputs in store.manifests(KIND) if isinstance(inputs.get("steps"), int)]
    found = [
        (differences(inputs, wanted), inputs, folder)
        for folder, inputs in stored
        if magcache in ("artifact", folder.name)
    ]

    def distance(item: _Found) -> tuple[int, int, bool]:
        differences, inputs, _ = item
        other_measure = inputs.get("measured_by") != wanted["measured_by"]
        return len(differences), abs(inputs["steps"] - wanted["steps"]), other_measure

    if stored and not found:
        keys = ", ".join(folder.name for folder, _ in stored)
        raise MissingArtifactError(f"{option}: no curve has this key; use one of {keys}, or {fix}")
    fitting = sorted((item for item in found if set(item[0]) <= bridged), key=lambda item: (distance(item), item[2]))
    if not fitting:
        nearest = min(found, key=lambda item: len(item[0]), default=None)
        difference = f" (the curve {nearest[2].name} has {in_words(nearest[0])})" if nearest else ""
        if nearest and "facts" not in nearest[1]:
            difference = (
                f" (an earlier version of wanfast made the curve {nearest[2].name}, without the facts of its model)"
            )
        or_bridge = ", or add --magcache-interpolate" if nearest and set(nearest[0]) <= _BRIDGED else ""
        raise MissingArtifactError(f"{option}: no curve is calibrated for this run{difference}: {fix}{or_bridge}")
    best = [item for item in fitting if distance(item) == distance(fitting[0])]
    if len(best) > 1:
        keys = ", ".join(item[2].name for item in best)
        raise ConfigError(f"{option}: several curves fit this run: use --magcache with one of {keys}")
    _, inputs, folder = best[0]
    if store.path(KIND, inputs) != folder:
        raise CorruptArtifactError(f"{option}: {folder} was changed after it was made: remove this folder, and {fix}")
    store.find(KIND, inputs, verify=True, again=fix)
    return folder, inputs


def differences(inputs: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (stored value, wanted value)} of the inputs that a calibration and a run must have in common.

    Inputs that are equal are left out. `inputs`: those of the calibration, from an artifact's manifest. `wanted`: those
    of the run. The inputs that may differ, such as the clips, are not compared.
    """
    return {
        name: (inputs.get(name), value)
        for name, value in wanted.items()
        if name not in _NOT_COMPARED and inputs.get(name) != value
    }


def in_words(differences: dict[str, tuple[Any, Any]]) -> str:
    """Returns the `differences` between an artifact's inputs and this run's inputs as one text for a message."""
    long = {"experts": "other experts", "loras": "other LoRAs", "facts": "other facts of the model"}
    long["last_image"] = "no last images" if differences.get("last_image", (None, None))[1] else "last images"
    return "; ".join(long.get(name, f"{name} {old}, this run has {new}") for name, (old, new) in differences.items())


def calibrate_command(config: EffectiveConfig, spec: ModelSpec, command: Command = "calibrate-magcache") -> str:
    """Returns the command line of `command`, which measures a curve or makes a plan of attention for this run."""
    values = config.options()
    recipe = config.models.recipe
    of_recipe = without_lossy_attention(RECIPES[recipe].given(values)) if recipe else {}
    if values["attention"] in LOSSY_ATTENTION:
        values["attention"] = ModelsConfig.attention  # a curve is measured with exact attention
    if values["artifacts_dir"] == default_artifacts_dir():
        values["artifacts_dir"] = ModelsConfig.artifacts_dir
    given = ["wanfast", command]
    for name, field in {**options_of(ModelsConfig), **options_of(VideoConfig)}.items():
        default = of_recipe.get(name, getattr(spec, name) if field.option.own else field.default)
        if command in field.option.also and values[name] != default:
            given += words(name, values[name])
    if config.video.last_image is not None:
        given += words("set", "FOLDER")  # of the user's own, because the sets that ship have no last images
    return shlex.join([*given, *(words("device", "cuda") if config.ranks.device == "cuda" else ())])
