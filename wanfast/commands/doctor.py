"""`wanfast doctor`: reports what this machine has, what it lacks to make a video, and which command to type next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console

from wanfast.commands import options
from wanfast.runtime.facts.memory import CARDS, gb

_KEYS_SHOWN = 4
_MODES = (
    "resident: both experts stay on the GPU; evicting: some weights are in host memory while the VAE works; "
    "sharded: each GPU holds a share of the weights; offloaded: the idle expert is in host memory"
)
_CARDS = f"the driver reports {gb(CARDS['80 GB'])} for a card of 80 GB"

_Rows = list[tuple[str, str]]


@options.takes_options("doctor")
def doctor(
    context: typer.Context,
    json_: options.Json = False,
) -> None:
    """Report what is installed, what fits into the GPU memory, and what to type next.

    This command loads no weights.
    If your options name files of experts or LoRAs, this command stores the hashes of these files for later runs.
    Exit code: 0, even if something is missing; 2 for a wrong option; 4 if an option names a damaged file.
    """
    from wanfast.runtime.jobs import doctor as worker  # imports torch, which may be broken

    document = worker.examine(options.given(context))
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    for heading, rows in _sections(document):
        console.print(heading, style="bold", markup=False)
        width = max((len(name) for name, _ in rows if name), default=0)
        for name, value in rows:
            console.print(f"  {name:<{width}}  {value}" if width else f"  {value}", markup=False)
    if json_:
        print(json.dumps(document))


def _sections(document: dict[str, Any]) -> Iterator[tuple[str, _Rows]]:
    fit = document["fit"]
    yield "machine", _machine(document)
    yield "software", _software(document)
    device = document["attention"]["device"]
    yield f"attention on {device}" if device else "attention", _attention(document["attention"]["kernels"], device)
    yield "files", _files(document)
    held = fit["quantize"] or fit["precision"]
    if fit["needs_gpu"]:
        yield f"{fit['model']}, {fit['size']}, {fit['frames']} frames, {held}: GB a GPU", _fit(fit)
    yield f"next: {document['next']['why']}", [("", document["next"]["command"])]


def _machine(document: dict[str, Any]) -> _Rows:
    host = document["host"]
    rows = [
        (
            f"GPU {index}",
            f"{gpu['name']}, {gb(gpu['free_bytes'])} of {gb(gpu['total_bytes'])} free, capability "
            f"{gpu['capability'][0]}.{gpu['capability'][1]}, {gpu['nvlinks']} NVLinks, driver {gpu['driver']}",
        )
        for index, gpu in enumerate(document["gpus"])
    ]
    limit = " in this control group" if host["memory_is_limited"] else ""
    return [
        *(rows or [("GPUs", "NVIDIA's driver shows none")]),
        ("memory", f"{gb(host['available_bytes'])} of {gb(host['memory_bytes'])} free{limit}, {host['cores']} cores"),
        ("disk", f"{gb(host['disk_free_bytes'])} free at {host['disk']}"),
    ]


def _software(document: dict[str, Any]) -> _Rows:
    versions, torch, encoder = document["versions"], document["torch"], document["encoder"]
    state = torch["trouble"] or f"CUDA {torch['cuda']}, cuDNN {torch['cudnn']}, sees the GPU"
    libraries = ", ".join(f"{name} {encoder['libraries'].get(name)}" for name in ("libavcodec", "libswscale"))
    x264 = "libx264 works" if encoder["libx264"] else f"no libx264: {encoder['trouble']}"
    return [
        ("wanfast", f"{versions['wanfast']}, Python {versions['python']}"),
        ("torch", f"{versions['torch']}, {state}"),
        (
            "torchao",
            versions.get("torchao")
            or "not installed; `wanfast quantize` needs it, but stored quantized experts do not",
        ),
        ("video", f"PyAV {versions['av']}, {libraries}, {x264}"),
        ("ffmpeg", f"{encoder['ffmpeg'] or 'none on PATH'}; PyAV brings its own libraries"),
    ]


def _attention(kernels: dict[str, Any], device: str | None) -> _Rows:
    not_here = ("not installed", "needs a GPU") if device == "cpu" else ()
    for_gpus = [name for name, found in kernels.items() if found["state"] in not_here]
    rows = [
        (
            name,
            f"runs, relative error {found['relative_error']:.1e}"
            if found["state"] == "runs"
            else f"{found['state']}: {found['reason']}",
        )
        for name, found in kernels.items()
        if name not in for_gpus
    ]
    rows += [(", ".join(for_gpus), "only on a GPU")] if for_gpus else []
    return rows or [("none", "torch cannot be imported")]


def _files(document: dict[str, Any]) -> _Rows:
    weights, artifacts = document["weights"], document["artifacts"]
    present = f"{weights['folder']}, {weights['layout']} layout, {gb(weights['bytes'])}"
    nothing = "" if artifacts["kinds"] else ": empty"
    rows = [("weights", weights["trouble"] or present), ("artifacts", artifacts["root"] + nothing)]
    for kind, found in artifacts["kinds"].items():
        shown = [f"{key} ({held})" if (held := found["holds"].get(key)) else key for key in found["keys"][:_KEYS_SHOWN]]
        keys = ", ".join(shown) + (", ..." if len(found["keys"]) > _KEYS_SHOWN else "")
        rows.append((f"  {kind}", f"{len(found['keys'])}, {gb(found['bytes'])}" + (f": {keys}" if keys else "")))
    return rows


def _fit(fit: dict[str, Any]) -> _Rows:
    rows = [
        (
            name,
            ", ".join(f"{size / 1e9:.1f} in {precision}" for precision, size in fit[f"{key}_bytes"].items()),
        )
        for name, key in (("one expert", "expert"), ("UMT5, before the experts load", "umt5"))
    ]
    ways = [(f"{way['num_gpus']} GPU{'s' * (way['num_gpus'] > 1)}, {way['mode']}", _sum(way)) for way in fit["ways"]]
    cards = [("cards", _CARDS)] if fit["ways"][0]["host_free"] is None else []
    return [*rows, *ways, ("modes", _MODES), *cards]


def _sum(way: dict[str, Any]) -> str:
    terms = " + ".join(f"{size / 1e9:.1f} {name}" for name, size in way["terms"].items())
    host = f", and {way['host_bytes'] / 1e9:.1f} on the host" if way["host_bytes"] else ""
    return f"{terms} = {way['gpu_bytes'] / 1e9:.1f}{host}: {_verdict(way)}"


def _verdict(way: dict[str, Any]) -> str:
    cards = [card for card, fits in way["fits"].items() if fits]
    if way["host_free"] is None:
        return f"fits GPUs of {', '.join(cards)}" if cards else f"fits none of {', '.join(way['fits'])}"
    free = f"{min(way['free'].values()) / 1e9:.1f} free"
    if not way["fits_host"]:
        free += f", and {way['host_free'] / 1e9:.1f} on the host"
    return f"{'fits' if cards else 'does not fit'}, {free}"
