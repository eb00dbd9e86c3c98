"""Finds the plans of attention that `wanfast calibrate-attention` stored: the density of each head, layer and band.

A plan fits a run if the calibration had the same experts and LoRAs as the run, and the same options for the schedule,
the size and the precision. --lists-every must be equal too. The VAE, the negative prompt, the attention kernel, the
code and the device may differ. The docstring of `store.curves` lists in more detail what must be equal, and what may
differ. If no plan fits, the error names the command that makes one.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from wanfast.runtime.facts.densities import CHOICES, LADDER, Calibrated, Densities, bands_of
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.facts.sparsity import BLOCK
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.curves import (
    calibrate_command,
    curve_inputs,
    differences,
    in_words,
    levels_option,
    steps_of_video,
)
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.model_files import ModelFiles

KIND = "attention_plans"
PLAN = "plan.json"


def plan_inputs(config: EffectiveConfig, files: ModelFiles, set_digest: str) -> dict[str, Any]:
    """Returns all that decides how large the errors of sparse attention are, as JSON: weights, options, clips and code.

    `set_digest`: the digest of the clips on which a calibration measures the errors. Raises MissingArtifactError if
    weights are missing. The key of a plan also depends on the target error, and on whether heads may be in float8.
    """
    inputs = curve_inputs(config, files, set_digest)
    code = digest_of_code("attention_calib/*.py", "runtime/facts/densities.py", "runtime/facts/sparsity.py")
    return {
        **inputs,
        "lists_every": config.models.lists_every,
        "ladder": [*LADDER],
        "block": BLOCK,
        "measured_by": inputs["measured_by"] | {"plan_code": code},
    }


def settle(config: EffectiveConfig, files: ModelFiles) -> EffectiveConfig:
    """Replaces `--attention-plan artifact` by the key of the plan that fits this run. Raises WanFastError."""
    if config.models.attention_plan is None:
        return config
    if config.video.levels is not None:
        option = levels_option(config)
        raise ConfigError(
            f"--attention-plan and {option} exclude each other, because a plan is calibrated with --steps and --shift: "
            f"use --density, or drop {option}"
        )
    models = dataclasses.replace(config.models, attention_plan=_artifact(config, files).name)
    return dataclasses.replace(config, models=models)


def densities_of(config: EffectiveConfig, files: ModelFiles) -> Densities | None:
    """Returns the densities of --attention-plan, or None without this option. Raises WanFastError."""
    if config.models.attention_plan is None:
        return None
    again = f"run `{calibrate_command(config, files.spec, 'calibrate-attention')}`"
    bands = bands_of([expert for expert, _ in steps_of_video(config.video, files.spec.boundary)])
    return _read(_artifact(config, files), files.spec.dit, again, bands)


def densities_of_any_run(config: EffectiveConfig, dit: DiTSpec) -> Densities | None:
    """Returns the densities of the plan whose key --attention-plan gives, or None without this option.

    The plan may be for other weights, steps or sizes. `wanfast warmup` uses this function, because a warmup reads no
    weights and has no --steps, and so cannot check whether a plan fits. Raises WanFastError.
    """
    asked = config.models.attention_plan
    if asked is None:
        return None
    store = ArtifactStore(Path(config.models.artifacts_dir))
    stored, again = dict(store.manifests(KIND)), "run `wanfast calibrate-attention`"
    keys = ", ".join(folder.name for folder in stored)
    use = f"use --attention-plan with one of the keys {keys}" if stored else again
    if asked == "artifact":
        raise ConfigError(f"--attention-plan artifact: this command cannot tell which plan fits a run: {use}")
    folder = next((folder for folder in stored if folder.name == asked), None)
    if folder is None:
        raise MissingArtifactError(f"--attention-plan {asked}: no plan has this key: {use}")
    _verify(store, folder, stored[folder], f"--attention-plan {asked}", again)
    return _read(folder, dit, again)


def _read(folder: Path, dit: DiTSpec, again: str, wanted_bands: tuple[int, ...] | None = None) -> Densities:
    """Reads a plan, which must have the `wanted_bands`, if they are given, and a density for each head of the model."""
    fix = f"remove this folder, and {again}"
    document = read_object(folder / PLAN, fix)
    try:
        bands = tuple(document["bands"])
        by_band = tuple(tuple(map(tuple, layers)) for layers in document["densities"])
        errors = {name: float(document[name]) for name in ("target_error", "mean_error", "largest_error")}
        is_whole = (
            bands == (wanted_bands or bands)
            and len(by_band) == len(bands)
            and {len(layers) for layers in by_band} == {dit.num_layers}
            and {len(heads) for layers in by_band for heads in layers} == {dit.num_heads}
            and {head for layers in by_band for heads in layers for head in heads} <= {*CHOICES}
        )
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise CorruptArtifactError(
            f"--attention-plan: {folder} does not hold a density for each band, layer and head: {fix}"
        )
    return Densities(bands=bands, by_band=by_band, calibrated=Calibrated(key=folder.name, **errors))


def _artifact(config: EffectiveConfig, files: ModelFiles) -> Path:
    """Returns the folder of the plan that was calibrated for this run, or whose key --attention-plan names."""
    assert config.models.attention_plan is not None
    fix = f"run `{calibrate_command(config, files.spec, 'calibrate-attention')}`"
    wanted = json.dumps(plan_inputs(config, files, ""))
    return _found(config.models.artifacts_dir, config.models.attention_plan, wanted, fix)


@remembered
def _found(artifacts_dir: str, asked: str, inputs_json: str, fix: str) -> Path:
    """Returns the folder of a plan, verified; a list asks once for each plan that its lines need."""
    store, option, wanted = ArtifactStore(Path(artifacts_dir)), f"--attention-plan {asked}", json.loads(inputs_json)
    stored = [*store.manifests(KIND)]
    found = [(differences(inputs, wanted), inputs, folder) for folder, inputs in stored]
    found = [item for item in found if asked in ("artifact", item[2].name)]
    if stored and not found:
        keys = ", ".join(folder.name for folder, _ in stored)
        raise MissingArtifactError(f"{option}: no plan has this key: use one of {keys}, or {fix}")
    fitting = [item for item in found if not item[0]]
    if not fitting:
        nearest = min(found, key=lambda item: len(item[0]), default=None)
        difference = f" (the plan {nearest[2].name} has {in_words(nearest[0])})" if nearest else ""
        raise MissingArtifactError(f"{option}: no plan is calibrated for this run{difference}: {fix}")
    alike = [item for item in fitting if item[1].get("measured_by") == wanted["measured_by"]] or fitting
    if len(alike) > 1:
        targets = ", ".join(f"{folder.name} ({_target(inputs)})" for _, inputs, folder in alike)
        raise ConfigError(f"{option}: several plans fit this run: use --attention-plan with one of the keys {targets}")
    _, inputs, folder = alike[0]
    _verify(store, folder, inputs, option, fix)
    return folder


def _verify(store: ArtifactStore, folder: Path, inputs: dict[str, Any], option: str, fix: str) -> None:
    """Raises CorruptArtifactError if the plan in `folder`, or its manifest with these `inputs`, was changed."""
    if store.path(KIND, inputs) != folder:
        raise CorruptArtifactError(f"{option}: {folder} was changed after it was made: remove this folder, and {fix}")
    store.find(KIND, inputs, verify=True, again=fix)


def _target(inputs: dict[str, Any]) -> str:
    return f"target {inputs.get('target_error')}{', with float8' if inputs.get('fp8') else ''}"
