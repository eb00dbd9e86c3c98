"""`wanfast warmup`: compile once what `generate --compile` would, and keep it for every later process."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.console import Console

from wanfast.commands import dispatch, options
from wanfast.runtime import media_io, model_files
from wanfast.runtime.config import GenerateConfig, parse_size
from wanfast.runtime.errors import from_failure
from wanfast.runtime.next_step import WARMUP_OPTIONS
from wanfast.runtime.packages import require_attention
from wanfast.runtime.placement import is_cpu_for_want_of_a_gpu, place
from wanfast.runtime.plan import Plan, effective

_SHAPE_ALONE = {"image": "of no picture", "prompt": "none"}  # what a request needs and a warmup does not


def warmup(
    context: typer.Context,
    model: options.Model = "a14b",
    image: Annotated[
        str | None, typer.Option(help="A picture of the shape that the videos will have.  [default: that of --size]")
    ] = None,
    size: options.Size = None,
    frames: options.Frames = None,
    precision: options.PrecisionOption = "bf16",
    attention: options.AttentionOption = "auto",
    quantize: options.Quantize = None,
    tf32: options.Tf32 = None,
    compile_mode: options.CompileModeOption = "default",
    device: options.DeviceOption = None,
    num_gpus: options.NumGpus = 1,
    cfg_parallel: options.CfgParallel = None,
    ulysses: options.Ulysses = None,
    dit_fsdp: options.DitFsdp = "auto",
    expert_offload: options.ExpertOffload = "auto",
    rank_timeout: options.RankTimeout = 600.0,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    json_: options.Json = False,
) -> None:
    """Compile an expert's block for a size and a number of GPUs, and keep it: `generate --compile` then starts warm.

    It needs no weights. Copy `inductor/` of the artifacts folder to other machines of the same kind. On a CPU it
    saves little, since its C++ is built anew.
    """
    given = options.given(context, set(WARMUP_OPTIONS))
    plan, image_size = planned(given)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    if is_cpu_for_want_of_a_gpu(device, plan):
        note = "no GPU was found, so a block is compiled and run on the CPU, which takes long at this size"
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"note: {note}")
    job = dataclasses.replace(plan.job(given), image_size=image_size)
    (result,) = dispatch.run_jobs(
        "warmup", [job], [plan], artifacts_dir, show_progress=console.is_terminal, on_result=lambda index, result: None
    )
    if "error" in result:
        raise from_failure(result)
    console.print(said(result), markup=False)
    if json_:
        print(json.dumps(result))


def planned(given: dict[str, Any]) -> tuple[Plan, tuple[int, int]]:
    """What a generation with these options would be, and the shape of its image. Raises WanFastError."""
    request = GenerateConfig(**{**_SHAPE_ALONE, **given, "compile": True})
    files = model_files.locate(request.model, request.artifacts_dir)
    config = effective(request, files, image_sha256="")
    require_attention(config.attention, config.device)
    image_size = media_io.load_image(given["image"]).size if "image" in given else parse_size(config.size)
    (plan,) = place([request], [Plan.of(config, files.spec, image_size)])
    return plan, image_size


def said(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    shape = f"{result['width']}x{result['height']}, {result['frames']} frames, {result['attention']} attention"
    first, second = (f"{seconds[name]:.1f} s" for name in ("first", "second"))
    what = "was there already, and loads" if result["was_there"] else f"{result['bytes'] / 1e6:.1f} MB"
    return f"{result['output']}: {what}; {shape}; first forward of a block {first}, second {second}"
