"""Where MagCache's ratios come from: a model's preset, or a curve that `wanfast calibrate-magcache` kept. Torch-free.

A curve holds for what it was measured on, and its key says what that is: both experts and their precision, steps,
shift, solver, guidance, size, frames, and the set of clips. For another run it is refused, with the command that
measures a new one; steps and shift alone can be bridged (`--magcache-interpolate`): the ratios are of a smooth curve.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.artifacts import MANIFEST, ArtifactStore
from wanfast.runtime.config import EffectiveConfig, Expert, GenerateConfig, magcache_settings
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.model_spec import A14B, ModelSpec
from wanfast.runtime.sampling.magcache import resample
from wanfast.runtime.sampling.scheduler import expert_of, schedule

KIND = "magcache"
RATIOS = "ratios.json"
_PRESETS = Path(__file__).parents[1] / "assets" / "magcache"
_BRIDGED = {"steps", "shift"}
_DEFAULTS = (0.12, 2, 0.2)  # the published matrix's: threshold, skips in a row, share retained


@dataclass(frozen=True)
class Curve:
    """The ratios of each step of a run, and whose they are."""

    name: str  # preset, or the key of an artifact
    ratios: tuple[tuple[float, float], ...]
    interpolated_from: dict[str, Any] | None = None  # steps and shift of the curve, where they are not the run's


def settle(request: GenerateConfig, config: EffectiveConfig, files: ModelFiles) -> EffectiveConfig:
    """`config` with what --magcache asks for: which curve, and when to skip. Raises WanFastError."""
    if request.magcache == "off":
        return config
    same = ("magcache_joint", "magcache_budget", "magcache_skip", "magcache_interpolate")
    settings: dict[str, Any] = {option: getattr(request, option) for option in same}
    short = magcache_settings(request.magcache)
    name = "preset" if short else request.magcache
    for option, value in zip(("magcache_thresh", "magcache_k", "retention_ratio"), short or _DEFAULTS, strict=True):
        given = getattr(request, option)
        settings[option] = value if given is None else given
    by_budget = request.magcache_budget is not None or request.magcache_skip is not None
    if by_budget:
        settings["magcache_thresh"] = None
    settings["magcache_rule"] = request.magcache_rule or ("both-experts" if by_budget else "low-noise-only")
    config = dataclasses.replace(config, magcache=name, **settings)
    if name == "preset":
        return config
    return dataclasses.replace(config, magcache=_artifact(config, files).name)


def curve_of(config: EffectiveConfig, files: ModelFiles) -> Curve | None:
    """For the steps of this run; None if nothing is to be skipped. Raises WanFastError."""
    if config.magcache == "off":
        return None
    if config.magcache == "preset":
        found = preset(files)
        if found is None:
            fix = f"run `{calibrate_command(config, files.spec)}`, then take --magcache artifact"
            raise ConfigError(f"--magcache preset: no curve ships for these weights ({files.spec.name}): {fix}")
        return _fitted("preset", found, config, files.spec)
    folder = _artifact(config, files)
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["inputs"]
    ratios = json.loads((folder / RATIOS).read_text(encoding="utf-8"))["ratios"]
    return _fitted(folder.name, document | {"ratios": ratios}, config, files.spec)


def preset(files: ModelFiles) -> dict[str, Any] | None:
    """The curve that ships for a model: its `ratios`, and of what they are.

    Where the curve names its weights it is theirs alone. The published one names none: it is taken for every model of
    the A14B's sizes, and `magcache_notes` says so.
    """
    sizes = files.spec.dit, files.spec.boundary
    if sizes == (A14B.dit, A14B.boundary):
        return published_curve()
    for file in sorted(_PRESETS.glob("*.json")):
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if files.exists and document.get("experts") == _experts(files):
            return document
    return None


def published_curve() -> dict[str, Any]:
    """That of the A14B, by MagCache's makers."""
    document: dict[str, Any] = json.loads((_PRESETS / "wan2.2-i2v-a14b.json").read_text(encoding="utf-8"))
    return document


def magcache_notes(config: EffectiveConfig, files: ModelFiles) -> list[str]:
    """What a preset does not quite fit."""
    if config.magcache != "preset":
        return []
    published = (A14B.name, f"{A14B.name}-Diffusers", "tiny")
    others = [] if files.spec.name in published else [f"the weights of {A14B.name}"]
    kind = config.quantize or config.precision
    others += [] if kind == "bf16" else [f"bf16, not {kind}"]
    if not others:
        return []
    return [
        f"--magcache preset: its curve is of {' and '.join(others)}; `wanfast calibrate-magcache` measures your own"
    ]


def _experts(files: ModelFiles) -> dict[str, str]:
    return {name: files.fingerprint(name) for name in ("high_noise", "low_noise")}


def _fitted(name: str, of: dict[str, Any], config: EffectiveConfig, spec: ModelSpec) -> Curve:
    ratios = [(float(prompt), float(negative_prompt)) for prompt, negative_prompt in of["ratios"]]
    known = steps_of(of["solver"], of["steps"], of["shift"], spec.boundary)
    wanted = steps_of(config.solver, config.steps, config.shift, spec.boundary)
    if known == wanted and of["solver"] == config.solver:
        return Curve(name, tuple(ratios))
    if not config.magcache_interpolate or of["solver"] != config.solver:
        there = f"{of['steps']} steps by {of['solver']} at shift {of['shift']:g}"
        bridge = "add --magcache-interpolate, or " if of["solver"] == config.solver else ""
        here = f"{config.steps} by {config.solver} at {config.shift:g}"
        raise ConfigError(
            f"--magcache {name}: that curve is of {there}, and this run has {here}: {bridge}run "
            f"`{calibrate_command(config, spec)}` and take --magcache artifact"
        )
    try:
        bridged = resample(ratios, known, wanted)
    except ConfigError as error:
        fix = f"run `{calibrate_command(config, spec)}`"
        raise ConfigError(f"--magcache-interpolate: {error}: {fix}") from None
    return Curve(name, tuple(bridged), {"steps": of["steps"], "shift": of["shift"]})


def steps_of(solver: Any, steps: int, shift: float, boundary: float) -> list[tuple[Expert, int]]:
    """(expert at work, timestep) of each step."""
    return [(expert_of(step.timestep, boundary), step.timestep) for step in schedule(solver, steps, shift)]


def curve_inputs(config: EffectiveConfig, files: ModelFiles, set_digest: str) -> dict[str, Any]:
    """All that a calibrated curve depends on. Raises MissingArtifactError without the weights."""
    return {
        "experts": _experts(files),
        "boundary": files.spec.boundary,
        "precision": config.precision,
        "quantize": config.quantize,
        "solver": config.solver,
        "steps": config.steps,
        "shift": config.shift,
        "guidance": {"high_noise": config.guidance_high_noise, "low_noise": config.guidance_low_noise},
        "size": config.size,
        "frames": config.frames,
        "set": set_digest,
    }


def _artifact(config: EffectiveConfig, files: ModelFiles) -> Path:
    """The folder of the curve that was calibrated for this run, or that `config.magcache` names by its key."""
    store, option = ArtifactStore(Path(config.artifacts_dir)), f"--magcache {config.magcache}"
    wanted = curve_inputs(config, files, "")
    bridged = _BRIDGED if config.magcache_interpolate else set()
    fix = f"run `{calibrate_command(config, files.spec)}`"
    kept = list(_kept(store))
    found = [
        (_differences(inputs, wanted), inputs, folder)
        for folder, inputs in kept
        if config.magcache in ("artifact", folder.name)
    ]
    if kept and not found:
        keys = ", ".join(folder.name for folder, _ in kept)
        raise MissingArtifactError(f"{option}: there is no such curve, but {keys}: name one, or {fix}")
    fitting = sorted(
        (item for item in found if set(item[0]) <= bridged),
        key=lambda item: (len(item[0]), abs(item[1]["steps"] - config.steps), item[2]),
    )
    if not fitting:
        nearest = min(found, key=lambda item: len(item[0]), default=None)
        said = f" ({nearest[2].name} differs in {_said(nearest[0])})" if nearest else ""
        or_bridge = ", or add --magcache-interpolate" if nearest and set(nearest[0]) <= _BRIDGED else ""
        raise MissingArtifactError(f"{option}: no curve is calibrated for this run{said}: {fix}{or_bridge}")
    best = [item for item in fitting if (item[0], item[1]["steps"]) == (fitting[0][0], fitting[0][1]["steps"])]
    if len(best) > 1:
        keys = ", ".join(item[2].name for item in best)
        raise ConfigError(f"{option}: several sets were calibrated for this run: name one by its key, of {keys}")
    _, inputs, folder = best[0]
    try:
        sound = store.find(KIND, inputs, verify=True) == folder
    except CorruptArtifactError:
        sound = False
    if not sound:
        raise CorruptArtifactError(f"{option}: {folder} was changed after it was made: remove it, and {fix}")
    return folder


def _kept(store: ArtifactStore) -> Iterator[tuple[Path, dict[str, Any]]]:
    for manifest in sorted((store.root / KIND).glob(f"*/{MANIFEST}")):
        try:
            inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
        except (ValueError, KeyError, TypeError):
            continue  # no curve of ours
        if isinstance(inputs, dict) and isinstance(inputs.get("steps"), int):
            yield manifest.parent, inputs


def _differences(inputs: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a curve is of and what is wanted, where they differ; the set of clips is free."""
    return {
        name: (inputs.get(name), value)
        for name, value in wanted.items()
        if name != "set" and inputs.get(name) != json.loads(json.dumps(value))
    }


def _said(differences: dict[str, tuple[Any, Any]]) -> str:
    plain = {name: f" ({there}, here {here})" for name, (there, here) in differences.items() if name != "experts"}
    return ", ".join(f"{name}{plain.get(name, '')}" for name in differences)


def calibrate_command(config: EffectiveConfig, spec: ModelSpec) -> str:
    """`wanfast calibrate-magcache` for a run's curve."""
    own = {
        "model": GenerateConfig.model,
        "artifacts_dir": str(Path(GenerateConfig.artifacts_dir).absolute()),
        "solver": GenerateConfig.solver,
        "precision": GenerateConfig.precision,
        "quantize": None,
        "device": config.device if config.device == "cuda" else None,
        **{name: getattr(spec, name) for name in ("size", "frames", "steps", "shift")},
        **{name: getattr(spec, name) for name in ("guidance_high_noise", "guidance_low_noise")},
    }
    words = ["wanfast", "calibrate-magcache"]
    for name, default in own.items():
        if (value := getattr(config, name)) != default:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
