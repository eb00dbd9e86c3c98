"""`wanfast calibrate-magcache`: measures the curve of MagCache over a set of clips, and stores the curve."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.commands import options
from wanfast.commands.calibration import measured_clips, plans_of
from wanfast.magcache_calib.clips import Clip, digest_of, read_set, shipped_set
from wanfast.magcache_calib.ratios import PLOT, against_preset, averaged, is_whole, write_curve
from wanfast.runtime.config import NO_VIDEO, of_command
from wanfast.runtime.config.option import absolute
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine import packages
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.planning.completed import model_of
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.curves import KIND, RATIOS, curve_inputs
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import require_experts


@options.takes_options("calibrate-magcache")
def calibrate_magcache(
    context: typer.Context,
    set_: Annotated[Path | None, options.clip_set("the set that ships")] = None,
    seed: options.SeedOfClips = 0,
    json_: options.Json = False,
) -> None:
    """Measure the curve by which MagCache skips forwards, and store the curve for `generate --magcache artifact`.

    Each clip of a set is denoised without skips. The curve says how much the residual changes from step to step.
    Each clip's measurements are stored when the clip is done, so that an interrupted run continues with the next clip.
    """
    given = of_command(options.given(context), "calibrate-magcache")
    given.pop("seed", None)
    if given.get("steps", 2) < 2:
        raise ConfigError(
            f"--steps {given['steps']}: the curve compares each step with the step before: use --steps 2 or more"
        )
    if find_spec("matplotlib") is None:
        raise ConfigError(f"the plot of the curve needs matplotlib: run `{packages.install('plots')}`")
    with asked_once():
        files = model_of({**NO_VIDEO, **given})  # before the clips are read
        files.require()
        folder = shipped_set(files.spec) if set_ is None else Path(absolute(str(set_), "--set"))
        clips = read_set(folder, seed, takes_images=files.spec.takes_images)
        plans = planned(given, clips, files)
        require_experts(files, plans[0].config.models)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    result = calibrated(given, plans, clips, files)
    console.print(describe(result), markup=False)
    if json_:
        print(json.dumps(result))


def planned(given: dict[str, Any], clips: list[Clip], files: ModelFiles) -> list[Plan]:
    """Returns one plan for each clip. Raises WanFastError.

    The plan's memory includes two residuals for each branch, because each step's residual is compared with the residual
    of the previous step.
    """
    return plans_of(given, clips, files, requested=given, residuals_a_branch=2)


def calibrated(given: dict[str, Any], plans: list[Plan], clips: list[Clip], files: ModelFiles) -> dict[str, Any]:
    """Returns a JSON document: the curve of the calibration set, and how the preset differs from this curve.

    The preset is the curve that ships for this model. If the set's curve is missing, it is measured first. Raises
    WanFastError.
    """
    config = plans[0].config
    store, inputs = ArtifactStore(Path(config.models.artifacts_dir)), curve_inputs(config, files, digest_of(clips))
    folder, made_here = store.find(KIND, inputs, verify=True), False
    if folder is None:
        of_clips = [
            curve_inputs(plan.config, files, digest_of([clip])) for plan, clip in zip(plans, clips, strict=True)
        ]
        is_measured = partial(is_whole, num_steps=len(plans[0].schedule))
        measured = measured_clips("calibrate-magcache", KIND, of_clips, plans, store, is_measured)
        averages = averaged(measured)
        published = store.publish(
            KIND,
            inputs,
            lambda into: write_curve(into, averages, config, files.spec, len(clips)),
            packages.versions(),
        )
        folder, made_here = published.folder, published.made_here
    curve = read_object(folder / RATIOS, "remove its folder, and run this command again")
    return {
        "output": str(folder),
        "key": folder.name,
        "was_there": not made_here,
        "clips": len(clips),
        "requested": given,
        "inputs": inputs,
        **{name: curve[name] for name in ("ratios", "spread", "scatter", "cosine_distance", "timesteps", "experts")},
        "preset": against_preset(curve, config, files),
        "versions": packages.versions(),
    }


def describe(result: dict[str, Any]) -> str:
    """Returns a text: the curve's folder, the range of its ratios, and how much the preset differs from the curve."""
    how = "was made in an earlier run" if result["was_there"] else f"measured on {result['clips']} clips"
    ratios = [ratio for row in result["ratios"][1:] for ratio in row]
    lines = [f"{result['output']}: {how}; ratios {min(ratios):.4f} to {max(ratios):.4f}"]
    if (preset := result["preset"]) is not None:
        worst = preset["worst"]
        spread = f"where the spread between tokens is {worst['spread']:.4f}"
        far = f"{worst['difference']:.4f} at step {worst['step']}, {spread}"
        steps = f"differs at {len(preset['steps'])} steps" if preset["differs"] else "agrees"
        lines.append(f"the preset {steps}: relative to the spread, the largest difference is {far}")
    lines.append(f"{result['output']}/{PLOT}: the curve")
    lines.append("`wanfast generate --magcache artifact` skips forwards with this curve")
    return "\n".join(lines)
