"""Averages the measurements of all clips into a curve, stores and plots the curve, and compares it with the preset.

This module does not import torch.
"""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.facts.choices import BRANCHES
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.store.artifacts import write_synced
from wanfast.runtime.store.curves import RATIOS, preset, steps_of, steps_of_video
from wanfast.runtime.store.model_files import ModelFiles

PLOT = "ratios.png"
_DIGITS = 7


def is_whole(measured: dict[str, Any], num_steps: int) -> bool:
    """Returns whether a clip's measurements hold finite numbers for each step."""
    return len(measured["steps"]) == num_steps and all(map(_is_measured, measured["steps"]))


def _is_measured(step: dict[str, dict[str, float] | None]) -> bool:
    """Returns whether all numbers of a step are finite; older versions stored others."""
    return all(math.isfinite(number) for branch in BRANCHES for number in (step[branch] or {}).values())


def averaged(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the curve over all clips: four lists, each with [prompt branch, negative branch] for every step.

    `ratios` and `cosine_distance` are means over the clips. `spread` is the standard deviation of the ratio over a
    clip's tokens, averaged over the clips. `scatter` is the standard deviation of the ratio over the clips. A step
    without guidance has only the prompt branch: this branch's numbers are used for both branches. A step without a
    measurement has the ratio 1, and 0 in the other lists.
    """
    curve: dict[str, list[list[float]]] = {"ratios": [], "spread": [], "scatter": [], "cosine_distance": []}
    for of_step in zip(*(clip["steps"] for clip in measured), strict=True):
        rows: dict[str, list[float]] = {name: [] for name in curve}
        for branch in BRANCHES:
            found = [step[branch] or step["prompt"] for step in of_step]
            found = [each for each in found if each]
            ratios = [each["ratio"] for each in found]
            rows["ratios"].append(_mean(ratios, 1.0))
            rows["spread"].append(_mean([each["spread"] for each in found], 0.0))
            rows["scatter"].append(round(statistics.stdev(ratios), _DIGITS) if len(ratios) > 1 else 0.0)
            rows["cosine_distance"].append(_mean([each["cosine_distance"] for each in found], 0.0))
        for name, row in rows.items():
            curve[name].append(row)
    return dict(curve)


def _mean(values: list[float], otherwise: float) -> float:
    return round(math.fsum(values) / len(values), _DIGITS) if values else otherwise


def against_preset(curve: dict[str, Any], config: EffectiveConfig, files: ModelFiles) -> dict[str, Any] | None:
    """Compares the curve with the model's preset, and lists the steps at which the ratios differ too much.

    A difference is too large if it exceeds the curve's spread at the step (the standard deviation over tokens). The
    first step of each expert is not compared, because no plan uses its ratio. Steps are counted from 0. Returns a dict:

    * "steps": the steps at which the difference is too large.
    * "differs": whether there is such a step.
    * "worst": {"step", "difference", "spread"} of the step with the largest quotient difference / spread.

    Returns None if the model has no preset, if the preset belongs to other timesteps than those of `config` or to
    videos without a last image, or if no step can be compared.
    """
    known, boundary = preset(files), files.spec.boundary
    here = steps_of_video(config.video, boundary)
    if (
        known is None
        or config.video.last_image is not None
        or steps_of(known["solver"], known["steps"], known["shift"], boundary) != here
    ):
        return None
    high = sum(expert == "high_noise" for expert, _ in here)
    found = [
        (abs(curve["ratios"][step][branch] - known["ratios"][step][branch]), curve["spread"][step][branch], step)
        for step in range(len(here))
        if step not in (0, high)
        for branch in (0, 1)
    ]
    if not found:
        return None
    difference, spread, step = max(found, key=lambda each: each[0] / max(each[1], 1e-9))
    return {
        "differs": difference > spread,
        "steps": sorted({step for difference, spread, step in found if difference > spread}),
        "worst": {"step": step, "difference": round(difference, 5), "spread": round(spread, 5)},
    }


def write_curve(folder: Path, curve: dict[str, Any], config: EffectiveConfig, spec: ModelSpec, num_clips: int) -> None:
    """Writes the curve as JSON and as a plot into the folder of an artifact."""
    steps = steps_of_video(config.video, spec.boundary)
    timesteps = [timestep for _, timestep in steps]
    experts = [expert for expert, _ in steps]
    facts = {"clips": num_clips, "experts": experts, "timesteps": timesteps}
    write_synced(folder / RATIOS, json.dumps(curve | facts, indent=1) + "\n")
    changes = [timestep for (one, _), (other, timestep) in pairwise(steps) if one != other]
    title = f"{spec.name}: {num_clips} clips, {config.video.steps} steps"
    _plot(folder / PLOT, curve, timesteps, changes, title)


def _plot(file: Path, curve: dict[str, Any], timesteps: list[int], changes: list[int], title: str) -> None:
    """Plots the ratios with their spread between tokens, and the cosine distance below.

    `changes`: the timestep at which the other expert begins, if both work.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for branch, name in enumerate(BRANCHES):
        ratios, spread, distance = (
            [row[branch] for row in curve[kind]][1:] for kind in ("ratios", "spread", "cosine_distance")
        )
        (line,) = above.plot(timesteps[1:], ratios, marker=".", label=name.replace("_", " "))
        lower, upper = ([r + sign * s for r, s in zip(ratios, spread, strict=True)] for sign in (-1, 1))
        band = f"{line.get_label()}, spread between tokens"
        above.fill_between(timesteps[1:], lower, upper, alpha=0.2, color=line.get_color(), label=band)
        below.plot(timesteps[1:], distance, marker=".", color=line.get_color())
    for timestep in changes:  # the other expert's residuals have other norms, so that the ratio jumps
        above.axvline(timestep, color="grey", linestyle=":", label="the low-noise expert begins")
    above.set(title=title, ylabel="residual norm / residual norm of the step before")
    below.set(xlabel="timestep", ylabel="cosine distance", ylim=(0, None))
    above.invert_xaxis()
    above.legend()
    figure.savefig(file, dpi=110)
