"""`wanfast calibrate-attention`: finds, for each attention head, the least density that meets a target error.

The command stores these densities as a plan of attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.attention_calib.choice import chosen, is_whole
from wanfast.commands import options
from wanfast.commands.calibration import PlannedSet, calibrated, planned_set
from wanfast.runtime.config import of_command
from wanfast.runtime.config.option import LOSSY
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.densities import FP8_SHARE, TARGET_ERROR, bands_of
from wanfast.runtime.machine.packages import require_fp8
from wanfast.runtime.store.artifacts import write_synced
from wanfast.runtime.store.attention_plans import KIND, PLAN, plan_inputs
from wanfast.runtime.store.json_files import read_object

# Lists hold all blocks and nothing is guarded, so that the memory plan counts what the calibration holds.
_SPARSE = {"attention": "sparse", "density": 1.0, "dense_share": 0.0, "dense_layers": 0, "attention_check": True}


@options.takes_options("calibrate-attention")
def calibrate_attention(
    context: typer.Context,
    set_: Annotated[Path | None, options.clip_set("the set that ships")] = None,
    target_error: Annotated[
        float,
        typer.Option(
            help="Largest allowed relative error of a head's output, in each clip and each band of steps. The error is "
            "the mean over all calls of attention in this clip and this band.",
            rich_help_panel=LOSSY,
        ),
    ] = TARGET_ERROR,
    fp8: Annotated[
        bool,
        typer.Option(
            help="Also try float8 for each head. A head gets float8 if float8 meets --target-error, and no density "
            f"under {FP8_SHARE} meets it. On a GPU, this command and every run with the plan then need "
            "FlashAttention-3.",
            rich_help_panel=LOSSY,
        ),
    ] = False,
    seed: options.SeedOfClips = 0,
    json_: options.Json = False,
) -> None:
    """Find, for each attention head, the least density that meets --target-error, and store a plan of these densities.

    A density is the share of the blocks of keys that a head computes.
    If no density meets --target-error, the head stays dense. With --fp8, a head may also compute in float8.
    `generate --attention sparse --attention-plan artifact` uses the plan.
    Each clip is denoised with dense attention. Meanwhile, the error that each density would cause is measured.
    The errors of a clip are stored when the clip is done, so that an interrupted run continues with the next clip.
    A run that changes only --target-error uses the stored errors.
    """
    given = of_command(options.given(context), "calibrate-attention")
    given.pop("seed", None)
    if not 0 < target_error < 1:
        raise ConfigError(f"--target-error {target_error:g}: use a number over 0 and under 1, such as 0.1")
    requested = {**given, **({"fp8": True} if fp8 else {})}  # the ranks read it too
    planned = planned_set({**given, **_SPARSE}, set_, seed, requested=requested)
    if fp8:
        require_fp8(planned.plans[0].config.ranks.device, "--fp8")
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    result = result_of(given, planned, target_error, fp8=fp8)
    console.print(describe(result), markup=False)
    if json_:
        print(json.dumps(result))


def result_of(given: dict[str, Any], planned: PlannedSet, target_error: float, *, fp8: bool) -> dict[str, Any]:
    """Returns a JSON document with the plan of attention for the calibration set. Raises WanFastError.

    If this plan of attention is not stored yet, the clips are measured first. `given`: the options that the user gave.
    `fp8`: whether float8 is tried too.
    """
    bands, dit = bands_of(planned.plans[0].experts), planned.files.spec.dit

    def writer(measured: list[dict[str, Any]]) -> Callable[[Path], None]:
        plan = {"clips": len(planned.clips), "bands": bands, **chosen(measured, target_error, fp8=fp8)}
        return lambda into: write_synced(into / PLAN, json.dumps(plan) + "\n")

    is_measured = partial(is_whole, shape=(len(bands), dit.num_layers, dit.num_heads), fp8=fp8)
    further = {"target_error": target_error, **({"fp8": True} if fp8 else {})}
    result = calibrated("calibrate-attention", KIND, planned, plan_inputs, further, is_measured, writer)
    plan = read_object(Path(result["output"]) / PLAN, "remove its folder, and run this command again")
    return {**result, "requested": given, **plan}


def describe(result: dict[str, Any]) -> str:
    """Returns a text: the plan's folder, its mean density, and the mean and the largest error of its heads.

    For each density that was tried, the text also states the mean error if all heads had this density.
    """
    how = "was made in an earlier run" if result["was_there"] else f"number of measured clips: {result['clips']}"
    heads = [density for layers in result["densities"] for of_layer in layers for density in of_layer]
    shares = {None: 1.0, "fp8": FP8_SHARE}
    mean = sum(shares.get(density, density) for density in heads) / len(heads)
    in_fp8 = f", {heads.count('fp8')} in float8" if "fp8" in heads else ""
    ladder = ", ".join(f"{rung['density']}: {rung['mean_error']:.3g}" for rung in result["ladder"])
    return "\n".join(
        [
            f"{result['output']}: {how}; mean density {mean:.2f}, "
            f"{heads.count(None)} of {len(heads)} heads dense{in_fp8}",
            f"error mean {result['mean_error']:.3g}, largest {result['largest_error']:.3g}, target "
            f"{result['target_error']:g}; error mean if all heads had one density: {ladder}",
            f"`wanfast generate --attention sparse --attention-plan {result['key']}` uses this plan",
        ]
    )
