"""`wanfast calibrate-magcache`: measures how residuals change over a set of clips, and keeps the curve."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.commands import dispatch, options
from wanfast.magcache_calib.clips import Clip, digest_of, read_set, shipped_set
from wanfast.magcache_calib.ratios import against_preset, averaged, read_clip, write_clip, write_curve
from wanfast.runtime import metadata, model_files
from wanfast.runtime.artifacts import ArtifactStore
from wanfast.runtime.config import GenerateConfig
from wanfast.runtime.errors import ConfigError, from_failure
from wanfast.runtime.magcache_curves import KIND, RATIOS, curve_inputs
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.placement import place
from wanfast.runtime.plan import Plan, effective
from wanfast.runtime.quantized_artifacts import require_experts
from wanfast.runtime.requests import Planned, Request


def calibrate_magcache(
    context: typer.Context,
    model: options.Model = "a14b",
    set_: Annotated[
        Path | None,
        typer.Option("--set", help="A folder of images with a clips.jsonl.  [default: the one that ships]"),
    ] = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    shift: options.Shift = None,
    guidance_high_noise: options.GuidanceHighNoise = None,
    guidance_low_noise: options.GuidanceLowNoise = None,
    solver: options.SolverOption = "unipc",
    seed: Annotated[int, typer.Option(help="Of the first clip; the others count up from it.")] = 0,
    precision: options.PrecisionOption = "bf16",
    attention: options.AttentionOption = "auto",
    quantize: options.Quantize = None,
    quantize_on_the_fly: options.QuantizeOnTheFly = False,
    verify: options.Verify = False,
    tf32: options.Tf32 = None,
    compile: options.Compile = False,
    compile_mode: options.CompileModeOption = "default",
    device: options.DeviceOption = None,
    num_gpus: options.NumGpus = 1,
    cfg_parallel: options.CfgParallel = None,
    ulysses: options.Ulysses = None,
    dit_fsdp: options.DitFsdp = "auto",
    t5_fsdp: options.T5Fsdp = "auto",
    expert_offload: options.ExpertOffload = "auto",
    rank_timeout: options.RankTimeout = 600.0,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    json_: options.Json = False,
) -> None:
    """Make every clip of a set without skipping, and keep the ratios that --magcache artifact plans by.

    Each clip is kept as it is done: a run that was cut off goes on where it was.
    """
    if steps is not None and steps < 2:
        raise ConfigError(f"--steps {steps}: one step has none before it to compare with: take 2 or more")
    if find_spec("matplotlib") is None:
        raise ConfigError("the plot of the curve needs matplotlib: pip install matplotlib")
    own = {"context", "set_", "seed", "json_"}
    given = options.given(context, set(inspect.signature(calibrate_magcache).parameters) - own)
    files = model_files.locate(model, artifacts_dir)
    files.require()
    clips = read_set(set_ or shipped_set(files.spec), seed)
    plans = planned(given, clips, files)
    require_experts(files, plans[0].config)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    result = calibrated(given, plans, clips, files, show_progress=console.is_terminal)
    console.print(said(result), markup=False)
    if json_:
        print(json.dumps(result))


def planned(given: dict[str, Any], clips: list[Clip], files: ModelFiles) -> list[Plan]:
    """A generation for each clip. Raises WanFastError."""
    requests, plans = [], []
    for clip in clips:
        request = GenerateConfig(**given, image=str(clip.image), prompt=clip.prompt, seed=clip.seed)
        plan = Plan.of(effective(request, files, clip.image_sha256), files.spec, clip.image_size)
        requests.append(request)
        plans.append(dataclasses.replace(plan, residuals_a_branch=2))  # this step's and that of the one before
    return place(requests, plans)


def calibrated(
    given: dict[str, Any], plans: list[Plan], clips: list[Clip], files: ModelFiles, *, show_progress: bool
) -> dict[str, Any]:
    """The curve of the set, measured if it is not there yet, and how it compares. Raises WanFastError."""
    config = plans[0].config
    store, inputs = ArtifactStore(Path(config.artifacts_dir)), curve_inputs(config, files, digest_of(clips))
    folder = store.find(KIND, inputs, verify=True)
    was_there = folder is not None
    if folder is None:
        measured = _measured(given, plans, clips, files, store, show_progress=show_progress)
        averages = averaged(measured)
        folder = store.publish(
            KIND,
            inputs,
            lambda partial: write_curve(partial, averages, config, files.spec, len(clips)),
            metadata.versions(),
        )
    curve = json.loads((folder / RATIOS).read_text(encoding="utf-8"))
    return {
        "output": str(folder),
        "key": folder.name,
        "was_there": was_there,
        "clips": len(clips),
        "requested": given,
        "inputs": inputs,
        **{name: curve[name] for name in ("ratios", "spread", "scatter", "cosine_distance", "timesteps", "experts")},
        "preset": against_preset(curve, config, files),
        "versions": metadata.versions(),
    }


def _measured(
    given: dict[str, Any],
    plans: list[Plan],
    clips: list[Clip],
    files: ModelFiles,
    store: ArtifactStore,
    *,
    show_progress: bool,
) -> list[dict[str, Any]]:
    """The measurements of every clip; each is kept as it comes, and those of an earlier run are not made again."""
    inputs = [curve_inputs(plan.config, files, digest_of([clip])) for plan, clip in zip(plans, clips, strict=True)]
    missing = [index for index, of_clip in enumerate(inputs) if read_clip(store, of_clip) is None]
    if len(missing) < len(clips):
        print(f"note: {len(clips) - len(missing)} of {len(clips)} clips were measured before", file=sys.stderr)

    def keep(index: int, result: dict[str, Any]) -> None:
        if "error" not in result:
            write_clip(store, inputs[missing[index]], result)

    if missing:
        results = dispatch.run_jobs(
            "calibrate-magcache",
            [Planned(Request(given), plans[index]).job() for index in missing],
            [plans[index] for index in missing],
            str(store.root),
            show_progress=show_progress,
            on_result=keep,
        )
        if failed := next((result for result in results if "error" in result), None):
            raise from_failure(failed)
    found = [read_clip(store, of_clip) for of_clip in inputs]
    return [measured for measured in found if measured is not None]


def said(result: dict[str, Any]) -> str:
    """For a person: where it is, the range of the ratios, and whether the preset says otherwise."""
    how = "was there already" if result["was_there"] else f"{result['clips']} clips"
    ratios = [ratio for row in result["ratios"][1:] for ratio in row]
    lines = [f"{result['output']}: {how}; ratios {min(ratios):.4f} to {max(ratios):.4f}"]
    if (preset := result["preset"]) is not None:
        worst = preset["worst"]
        far = f"{worst['difference']:.4f} apart at step {worst['step']}, where tokens spread by {worst['spread']:.4f}"
        steps = f"differs at {len(preset['steps'])} steps" if preset["differs"] else "agrees"
        lines.append(f"the preset {steps}; at worst {far}")
    lines.append("`wanfast generate --magcache artifact` skips by it")
    return "\n".join(lines)
