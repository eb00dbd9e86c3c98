"""`wanfast generate`: one video, or with --jobs many with the models loaded once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from wanfast.commands import dispatch, options
from wanfast.commands.report import Report
from wanfast.runtime import metadata, past_runs
from wanfast.runtime.config import Device, GenerateConfig
from wanfast.runtime.requests import Planned, own_share, plan_requests, read_requests

FIELDS = {field.name for field in dataclasses.fields(GenerateConfig)}


def generate(
    context: typer.Context,
    model: options.Model = "a14b",
    image: Annotated[str | None, typer.Option(help="The picture that the video starts from.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What should happen in the video.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What it should stay away from.  [default: the model's own]")
    ] = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    shift: options.Shift = None,
    guidance_high_noise: options.GuidanceHighNoise = None,
    guidance_low_noise: options.GuidanceLowNoise = None,
    solver: options.SolverOption = "unipc",
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video.  [default: random]")] = None,
    noise_device: Annotated[
        Device, typer.Option(help="Where noise is drawn: cpu is the same everywhere, cuda is as the reference does.")
    ] = "cpu",
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.  [default: 16]")] = None,
    precision: options.PrecisionOption = "bf16",
    attention: options.AttentionOption = "auto",
    quantize: options.Quantize = None,
    quantize_on_the_fly: options.QuantizeOnTheFly = False,
    verify: options.Verify = False,
    tf32: options.Tf32 = None,
    compile: options.Compile = False,
    compile_mode: options.CompileModeOption = "default",
    magcache: options.MagCache = "off",
    magcache_thresh: options.MagCacheThresh = None,
    magcache_k: options.MagCacheK = None,
    retention_ratio: options.RetentionRatio = None,
    magcache_rule: options.MagCacheRuleOption = None,
    magcache_joint: options.MagCacheJoint = "auto",
    magcache_budget: options.MagCacheBudget = None,
    magcache_skip: options.MagCacheSkip = None,
    magcache_interpolate: options.MagCacheInterpolate = False,
    device: options.DeviceOption = None,
    num_gpus: options.NumGpus = 1,
    nnodes: options.NumNodes = 1,
    node_rank: options.NodeRank = 0,
    rdzv_endpoint: options.RdzvEndpoint = None,
    cfg_parallel: options.CfgParallel = None,
    ulysses: options.Ulysses = None,
    dit_fsdp: options.DitFsdp = "auto",
    t5_fsdp: options.T5Fsdp = "auto",
    expert_offload: options.ExpertOffload = "auto",
    rank_timeout: options.RankTimeout = 600.0,
    output: Annotated[str, typer.Option(help="The .mp4 to write; its .json goes beside it.")] = "out.mp4",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="Also write a .png of evenly spaced frames.")
    ] = False,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 text file.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Run the .json of an earlier video again; other options override it.")
    ] = None,
    jobs: Annotated[
        Path | None, typer.Option(help="Many videos: a JSON object of options a line, over those given here.")
    ] = None,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Make a video from an image and a prompt."""
    report = Report(as_json=json_)
    requests = read_requests(options.given(context, FIELDS), prompt_file, from_, jobs)
    planned = own_share(plan_requests(requests, needs_weights=not dry_run))
    if not planned:
        report.no_share()
        return
    report.plans(planned, always=dry_run and not json_)
    results = [dry_result(item) for item in planned] if dry_run else run(planned, report, artifacts_dir)
    report.close(planned, results)


def dry_result(item: Planned) -> dict[str, Any]:
    if item.plan is None:
        return item.failure()
    return metadata.planned(item.plan, item.request.options) | {"predicted_s": past_runs.predicted_seconds(item.plan)}


def run(planned: list[Planned], report: Report, artifacts_dir: str) -> list[dict[str, Any]]:
    """Have done what has a plan; a result for each item."""
    ready = [item for item in planned if item.plan is not None]
    worked: list[dict[str, Any]] = []
    if ready:
        worked = dispatch.run_jobs(
            "generate",
            [item.job() for item in ready],
            [item.plan for item in ready if item.plan],
            artifacts_dir,
            show_progress=not report.brief,
            on_result=lambda index, result: report.result(ready[index], result),
        )
    done = iter(worked)
    return [next(done) if item.plan else item.failure() for item in planned]
