"""Collects in one document, for `wanfast doctor`, what this machine has and what it lacks for making a video.

This module changes nothing. If torch cannot be imported, the document says so, and lacks the entries that need torch.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, ModelsConfig, Options
from wanfast.runtime.errors import CorruptArtifactError, MissingArtifactError, WanFastError
from wanfast.runtime.facts.choices import EXPERTS, in_8_bits
from wanfast.runtime.facts.model_spec import A14B, PUBLISHED, ModelSpec
from wanfast.runtime.machine import gpus, host, packages
from wanfast.runtime.planning.memory_fit import fit
from wanfast.runtime.planning.next_step import NextStep, example, next_step
from wanfast.runtime.store import model_files, quantized
from wanfast.runtime.store.artifacts import MANIFEST, check_root
from wanfast.runtime.store.expert_files import identified
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.model_files import COMPONENTS, ModelFiles
from wanfast.runtime.store.quantized import TORCHAO_FIX, quantized_expert

# The kinds of artifacts, and the other folders beside them.
_KINDS = (
    "checkpoints",
    "loras",
    "prompt_embeds",
    "quantized",
    "magcache",
    "magcache_clips",
    "attention_plans",
    "attention_plans_clips",
    "cudnn",
    "inductor",
    "bench",
    "hashes",
    "runs",
)


def examine(given: Options) -> dict[str, Any]:
    """Returns the document of `wanfast doctor`.

    The document describes GPUs, host, torch, weights, artifacts, what fits into memory, and the next command to run.
    `given` holds the options that the user gave. Raises ConfigError if one of these options is wrong.
    """
    models = identified(EffectiveConfig.of({**NO_VIDEO, **given}, A14B).models)
    check_root(Path(models.artifacts_dir))
    found = gpus.visible_gpus()
    weights, spec = _weights(models)
    given = {**given, **example(spec)}
    fitted = fit(given, spec, found)
    host, torch = _host(Path(models.artifacts_dir)), _torch()
    no_weights = _no_weights(models, weights, host)
    quantize_step = None if no_weights else _quantize_step(models)
    step = next_step(
        given,
        fitted,
        no_torch=torch["trouble"],
        no_weights=no_weights,
        layout=weights["layout"],
        quantize_step=quantize_step,
    )
    return {
        "gpus": [dataclasses.asdict(gpu) for gpu in found],
        "host": host,
        "torch": torch,
        "attention": _attention(torch),
        "encoder": _encoder(),
        "weights": weights,
        "artifacts": _artifacts(Path(models.artifacts_dir)),
        "fit": fitted.to_json(),
        "next": dataclasses.asdict(step),
        "versions": packages.versions(),
    }


def _weights(models: ModelsConfig) -> tuple[dict[str, Any], ModelSpec]:
    """Returns the place and state of the model's files, and the model's facts (a published one's if none are read)."""
    found: dict[str, Any] = {"model": models.model, "folder": None, "layout": None, "bytes": 0, "trouble": None}
    spec = PUBLISHED.get(models.model, A14B)
    try:
        files = model_files.locate_for(models)
        spec = files.spec
        found |= {"folder": str(files.root), "layout": files.layout, "bytes": sum(_sizes(files))}
        files.require()
    except WanFastError as error:
        found["trouble"] = str(error)
    return found, spec


def _sizes(files: ModelFiles) -> Iterator[int]:
    """Yields the bytes of each weight file of the complete components."""
    for component in COMPONENTS:
        with suppress(WanFastError):
            yield from (file.stat().st_size for file in files.weights(component))


def _no_weights(models: ModelsConfig, weights: dict[str, Any], host: dict[str, Any]) -> str | None:
    trouble: str | None = weights["trouble"]
    free, needed = host["disk_free_bytes"], model_files.DOWNLOADED.get(models.model, 0)
    if trouble and free < needed - weights["bytes"]:
        return f"{trouble}; {host['disk']} has {free / 1e9:.1f} GB free: free some, or give another --artifacts-dir"
    return trouble


def _quantize_step(models: ModelsConfig) -> NextStep | None:
    """Returns the step that makes the experts that --quantize needs, if one is missing or was changed."""
    if models.quantize is None:
        return None
    files = model_files.locate_for(models)
    for expert in EXPERTS:
        wanted = quantized_expert(files, models, expert)
        assert wanted is not None
        try:
            wanted.require()
        except (MissingArtifactError, CorruptArtifactError) as error:
            if in_8_bits(models.quantize) and quantized.torchao_version() is None:
                return NextStep(TORCHAO_FIX, f"{error}, which needs torchao")
            return NextStep(wanted.fix, str(error))
    return None


def _host(artifacts: Path) -> dict[str, Any]:
    memory = host.memory()
    existing = next(path for path in (artifacts, *artifacts.parents) if path.is_dir())
    return {
        "cores": host.cores(),
        "memory_bytes": memory.total_bytes,
        "available_bytes": memory.free_bytes,
        "memory_is_limited": memory.is_limited,
        "disk": str(existing),
        "disk_free_bytes": shutil.disk_usage(existing).free,
    }


def _torch() -> dict[str, Any]:
    """Returns a description of torch; `trouble` says why torch sees no GPU, or why it cannot be imported."""
    found: dict[str, Any] = {"cuda": None, "cudnn": None, "imports": False, "sees_gpu": False, "trouble": None}
    try:
        import torch
    except (ImportError, OSError) as error:
        return {**found, "trouble": f"cannot be imported ({error})"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sees_gpu = torch.cuda.is_available()
    found |= {"cuda": torch.version.cuda, "imports": True, "sees_gpu": sees_gpu}
    found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if not sees_gpu:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found["trouble"] = ": ".join([built, *(str(warning.message).splitlines()[0] for warning in said[:1])])
    return found


def _attention(torch: dict[str, Any]) -> dict[str, Any]:
    """Returns whether each kernel runs on the device that a video would use."""
    if not torch["imports"]:
        return {"device": None, "kernels": {}}
    from wanfast.runtime.engine import attention_probe

    device = "cuda" if torch["sees_gpu"] else "cpu"
    findings = attention_probe.probe_all(device)
    return {"device": device, "kernels": {name: dataclasses.asdict(found) for name, found in findings.items()}}


def _encoder() -> dict[str, Any]:
    """Returns what is known of the video encoder, which is in PyAV's wheel; an ffmpeg on PATH is not used."""
    found: dict[str, Any] = {"libraries": {}, "libx264": False, "ffmpeg": shutil.which("ffmpeg"), "trouble": None}
    try:
        import av

        found["libraries"] = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
        av.codec.Codec("libx264", "w")
    except (ImportError, OSError, ValueError) as error:  # a missing codec is a ValueError
        return {**found, "trouble": str(error)}
    return {**found, "libx264": True}


def _artifacts(root: Path) -> dict[str, Any]:
    """Returns the keys of each kind that is present; unfinished artifacts are skipped."""
    kinds = {}
    for kind in _KINDS:
        if (root / kind).is_dir():
            keys = sorted(filter(_is_finished, (root / kind).iterdir()))
            kinds[kind] = {
                "keys": [path.name.removesuffix(".json") for path in keys],
                "holds": {path.name: said for path in keys if (said := _holds(kind, path))},
                "bytes": sum(map(_bytes_of, keys)),
            }
    return {"root": str(root), "kinds": kinds}


def _is_finished(path: Path) -> bool:
    """Returns whether a path is an artifact: a folder, or a JSON file; a folder in work has an ending of its own."""
    return path.suffix == ".json" if path.is_file() else path.suffix not in (".partial", ".damaged")


def _holds(kind: str, artifact: Path) -> str | None:
    """Returns what a key does not say, from the manifest; returns None if the manifest cannot be read."""
    with suppress(CorruptArtifactError, KeyError, TypeError):
        inputs = read_object(artifact / MANIFEST, "remove its folder")["inputs"]
        if kind == "quantized":
            return f"{inputs['expert']} with {inputs['recipe']}"
        if kind == "inductor":
            scheme = inputs["quantize"] or inputs["precision"]
            return f"{inputs['tokens']} tokens, {scheme}, {inputs['mode']}, for {inputs['device']}"
    return None


def _bytes_of(artifact: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder; a file that another process removes is skipped."""
    below = [Path(parent, name) for parent, _, names in os.walk(artifact) for name in names]
    total = 0
    for file in below if artifact.is_dir() else [artifact]:
        with suppress(OSError):
            total += file.stat().st_size
    return total
