"""`wanfast calibrate-magcache`: measures the curve of MagCache over a set of clips, and stores the curve."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.commands import options
from wanfast.commands.calibration import PlannedSet, calibrated, planned_set
from wanfast.magcache_calib.ratios import PLOT, against_preset, averaged, is_whole, write_curve
from wanfast.runtime.config import of_command
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine import packages
from wanfast.runtime.store.curves import KIND, RATIOS, curve_inputs
from wanfast.runtime.store.json_files import read_object


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
    # Each step's residual is compared with that of the step before, so that the memory holds two of each branch.
    planned = planned_set(given, set_, seed, requested=given, residuals_a_branch=2)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    result = result_of(given, planned)
    console.print(describe(result), markup=False)
    if json_:
        print(json.dumps(result))


def result_of(given: dict[str, Any], planned: PlannedSet) -> dict[str, Any]:
    """Returns a JSON document: the curve of the calibration set, and how the preset differs from this curve.

    The preset is the curve that ships for this model. If the set's curve is missing, it is measured first. Raises
    WanFastError.
    """
    first, spec, num_clips = planned.plans[0], planned.files.spec, len(planned.clips)

    def writer(measured: list[dict[str, Any]]) -> Callable[[Path], None]:
        return partial(write_curve, curve=averaged(measured), config=first.config, spec=spec, num_clips=num_clips)

    is_measured = partial(is_whole, num_steps=len(first.schedule))
    result = calibrated("calibrate-magcache", KIND, planned, curve_inputs, {}, is_measured, writer)
    curve = read_object(Path(result["output"]) / RATIOS, "remove its folder, and run this command again")
    return {
        **result,
        "requested": given,
        **{name: curve[name] for name in ("ratios", "spread", "scatter", "cosine_distance", "timesteps", "experts")},
        "preset": against_preset(curve, first.config, planned.files),
    }


def describe(result: dict[str, Any]) -> str:
    """Returns a text: the curve's folder, the range of its ratios, and how much the preset differs from the curve."""
    how = "was made in an earlier run" if result["was_there"] else f"number of measured clips: {result['clips']}"
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
