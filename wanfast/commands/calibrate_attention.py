"""`wanfast calibrate-attention`: finds, for each attention head, the least density that meets a target error.

The command stores these densities as a plan of attention.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.attention_calib.choice import chosen, is_whole
from wanfast.commands import options
from wanfast.commands.calibration import measured_clips, plans_of
from wanfast.magcache_calib.clips import Clip, digest_of, read_set, shipped_set
from wanfast.runtime.config import NO_VIDEO, of_command
from wanfast.runtime.config.option import LOSSY, absolute
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.densities import FP8_SHARE, TARGET_ERROR, bands_of
from wanfast.runtime.machine import packages
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.machine.packages import require_fp8
from wanfast.runtime.planning.completed import model_of
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import ArtifactStore, write_synced
from wanfast.runtime.store.attention_plans import KIND, PLAN, plan_inputs
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import require_experts

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
    with asked_once():
        files = model_of({**NO_VIDEO, **given, **_SPARSE})  # before the clips are read
        files.require()
        folder = shipped_set(files.spec) if set_ is None else Path(absolute(str(set_), "--set"))
        clips = read_set(folder, seed, takes_images=files.spec.takes_images)
        requested = {**given, **({"fp8": True} if fp8 else {})}  # the ranks read it too
        plans = plans_of({**given, **_SPARSE}, clips, files, requested=requested)
        require_experts(files, plans[0].config.models)
        if fp8:
            require_fp8(plans[0].config.ranks.device, "--fp8")
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    result = calibrated(given, plans, clips, files, target_error, fp8=fp8)
    console.print(describe(result), markup=False)
    if json_:
        print(json.dumps(result))


def calibrated(
    given: dict[str, Any],
    plans: list[Plan],
    clips: list[Clip],
    files: ModelFiles,
    target_error: float,
    *,
    fp8: bool,
) -> dict[str, Any]:
    """Returns a JSON document with the plan of attention for the calibration set. Raises WanFastError.

    If this plan of attention is not stored yet, the clips are measured first. `given`: the options that the user gave.
    `plans`: the plan of each clip's video. `fp8`: whether float8 is tried too.
    """
    config, store = plans[0].config, ArtifactStore(Path(plans[0].config.models.artifacts_dir))
    inputs = plan_inputs(config, files, digest_of(clips)) | {"target_error": target_error}
    inputs |= {"fp8": True} if fp8 else {}
    folder, made_here = store.find(KIND, inputs, verify=True), False
    if folder is None:
        bands, dit = bands_of(plans[0].experts), files.spec.dit
        of_clips = [plan_inputs(plan.config, files, digest_of([clip])) for plan, clip in zip(plans, clips, strict=True)]
        shape = len(bands), dit.num_layers, dit.num_heads
        measured = measured_clips(
            "calibrate-attention",
            KIND,
            of_clips,
            plans,
            store,
            partial(is_whole, shape=shape, fp8=fp8),
        )
        text = json.dumps({"clips": len(clips), "bands": bands, **chosen(measured, target_error, fp8=fp8)})
        published = store.publish(
            KIND, inputs, lambda into: write_synced(into / PLAN, text + "\n"), packages.versions()
        )
        folder, made_here = published.folder, published.made_here
    return {
        "output": str(folder),
        "key": folder.name,
        "was_there": not made_here,
        "requested": given,
        "inputs": inputs,
        **read_object(folder / PLAN, "remove its folder, and run this command again"),
        "versions": packages.versions(),
    }


def describe(result: dict[str, Any]) -> str:
    """Returns a text: the plan's folder, its mean density, and the mean and the largest error of its heads.

    For each density that was tried, the text also states the mean error if all heads had this density.
    """
    how = "was made in an earlier run" if result["was_there"] else f"measured on {result['clips']} clips"
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
