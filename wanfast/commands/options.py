"""Option types that commands share, and how typed options, files of options and defaults come together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wanfast.runtime.config import Attention, CompileMode, Device, MagCacheRule, Precision, Scheme, Solver, Switch

Model = Annotated[
    str,
    typer.Option(
        help="tiny (ships with the package), a14b (the published weights), or a folder in either public layout."
    ),
]
Size = Annotated[
    str | None, typer.Option(help="The area, as WIDTHxHEIGHT; the image's shape is kept.  [default: 1280x720]")
]
Frames = Annotated[int | None, typer.Option(help="4n+1 of them.  [default: 81]")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.  [default: 40]")]
Shift = Annotated[
    float | None, typer.Option(help="Moves steps to high noise; 3.0 is advised for 480p.  [default: 5.0]")
]
GuidanceHighNoise = Annotated[
    float | None, typer.Option(help="Guidance scale of the high-noise expert; 1 is none.  [default: 3.5]")
]
GuidanceLowNoise = Annotated[
    float | None, typer.Option(help="Guidance scale of the low-noise expert; 1 is none.  [default: 3.5]")
]
SolverOption = Annotated[Solver, typer.Option("--solver", help="Flow-matching solver.")]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to run.  [default: cuda where there is a driver]")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the matrix products; all that is small stays fp32.")]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        help="Its kernel: FlashAttention 3, 4 or 2, or one of torch's; auto takes the fastest that is right here."
    ),
]
Quantize = Annotated[
    Scheme | None,
    typer.Option(help="Experts quantized by this scheme, as `wanfast quantize` keeps them; bf16 is them cast alone."),
]
QuantizeOnTheFly = Annotated[
    bool,
    typer.Option(
        "--quantize-on-the-fly/--no-quantize-on-the-fly", help="Quantize while loading instead of taking what is kept."
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Hold the kept experts against their hashes first; about a second a GB.")
]
Tf32 = Annotated[
    bool | None,
    typer.Option(
        "--tf32/--no-tf32", help="TF32 in float32 products and convolutions.  [default: in the VAE's convolutions]"
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile", help="Compile the experts' blocks; the first run takes some ten seconds more."
    ),
]
CompileModeOption = Annotated[
    CompileMode, typer.Option(help="How hard --compile searches; max-autotune records CUDA graphs too.")
]
MagCache = Annotated[
    str,
    typer.Option(
        metavar="<off|preset|artifact|KEY|E012K2R20>",
        help="Skip forwards whose residual hardly changes, by the model's preset curve or a calibrated one. E012K2R20 "
        "is the preset with threshold 0.12, at most 2 skips in a row and the first 20 % computed.",
    ),
]
MagCacheThresh = Annotated[float | None, typer.Option(help="Error that may add up before a forward.  [default: 0.12]")]
MagCacheK = Annotated[int | None, typer.Option(help="Most skips of a branch in a row.  [default: 2]")]
RetentionRatio = Annotated[
    float | None, typer.Option(help="Share of an expert's forwards, the first, always computed.  [default: 0.2]")
]
MagCacheRuleOption = Annotated[
    MagCacheRule | None,
    typer.Option(
        "--magcache-rule",
        help="Where forwards are skipped; the high-noise expert sets motion and layout.  [default: low-noise-only, and "
        "both-experts with --magcache-budget or --magcache-skip]",
    ),
]
MagCacheJoint = Annotated[
    Switch, typer.Option(help="Both branches of guidance skip together; auto: where they are on different ranks.")
]
MagCacheBudget = Annotated[
    float | None, typer.Option(help="Share of forwards to compute, chosen for the least error instead of by threshold.")
]
MagCacheSkip = Annotated[int | None, typer.Option(help="The same by a number of forwards to skip.")]
MagCacheInterpolate = Annotated[
    bool,
    typer.Option(
        "--magcache-interpolate/--no-magcache-interpolate", help="Bridge a curve of other --steps or --shift to these."
    ),
]
ArtifactsDir = Annotated[
    str, typer.Option(envvar="WANFAST_ARTIFACTS", help="Where weights, embeddings and runs are kept.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]


def _number_or_auto(value: int | str) -> int | str:
    if value == "auto" or isinstance(value, int):
        return value
    if not value.isdecimal():
        raise typer.BadParameter("a number or auto is needed")
    return int(value)


NumGpus = Annotated[
    Any,
    typer.Option(
        parser=_number_or_auto,
        metavar="<int|auto>",
        help="Ranks on this machine, one a GPU; with --device cpu processes. auto takes all GPUs.",
    ),
]
NumNodes = Annotated[int, typer.Option(help="Machines; start wanfast on each, with the same options.")]
NodeRank = Annotated[int, typer.Option(help="Which of --nnodes this machine is, from 0.")]
RdzvEndpoint = Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, where several machines meet.")]
CfgParallel = Annotated[
    int | None, typer.Option(help="Ranks that share the branches of guidance, 1 or 2.  [default: 2 if they are there]")
]
Ulysses = Annotated[
    int | None, typer.Option(help="Ranks that share the tokens of a branch.  [default: as many as fit]")
]
DitFsdp = Annotated[Switch, typer.Option(help="Shard the experts over a video's ranks; auto: if they do not fit.")]
T5Fsdp = Annotated[Switch, typer.Option(help="Shard UMT5 likewise.")]
ExpertOffload = Annotated[
    Switch, typer.Option(help="Keep the idle expert in host memory; auto: if both do not fit and ranks are few.")
]
RankTimeout = Annotated[float, typer.Option(help="Seconds that ranks wait for one another before the run is ended.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; needs no weights.")]


def given(context: typer.Context, names: set[str]) -> dict[str, Any]:
    """The options among `names` that the user gave, on the command line or by environment: defaults are left out."""
    return {
        name: value
        for name, value in context.params.items()
        if name in names and (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }
