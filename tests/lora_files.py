"""Writes LoRA files of random values in the formats of public tools, and merges them in float64."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights.key_maps import rename_back

RANK = 3
Merged = dict[str, Tensor]  # our name: what the file adds in float64


def tiny_without_loras(folder: Path) -> Path:
    """Links the files of the tiny model into a new folder, except the LoRAs that may ship with it."""
    return Path(shutil.copytree(TINY, folder / "own", copy_function=os.link, ignore=shutil.ignore_patterns("loras")))


def modules(spec: DiTSpec) -> dict[str, list[int]]:
    """Returns {module: shape of its weight} of all modules that factors can change."""
    with torch.device("meta"):
        state = WanDiT(spec).state_dict()
    weights = {name: list(tensor.shape) for name, tensor in state.items() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): shape for name, shape in weights.items() if len(shape) > 1}


def of_blocks(spec: DiTSpec) -> dict[str, list[int]]:
    return {name: shape for name, shape in modules(spec).items() if name.startswith("blocks.")}


def diffusers(module: str) -> str:
    return rename_back("dit", "diffusers", f"{module}.weight").removesuffix(".weight")


def underscored(module: str) -> str:
    return module.replace(".", "_")


def factors(shape: list[int], rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Returns (down, up), in 5 dimensions for a convolution."""
    ones = [1] * (len(shape) - 2)
    return torch.randn(rank, *shape[1:]) / shape[1] ** 0.5, torch.randn(shape[0], rank, *ones)


def product(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1).double() @ down.flatten(1).double()).view(up.shape[0], *down.shape[1:])


def low_rank(
    wanted: Mapping[str, list[int]],
    names: Mapping[str, str],
    *,
    down: str = "lora_down.weight",
    up: str = "lora_up.weight",
    alpha: float | None = None,
) -> tuple[dict[str, Tensor], Merged]:
    """Returns (tensors of a file, what they add); `names` says how the file names each of our modules."""
    tensors, merged = {}, {}
    for module, shape in wanted.items():
        one, other = factors(shape)
        tensors |= {f"{names[module]}.{down}": one, f"{names[module]}.{up}": other}
        if alpha is not None:
            tensors[f"{names[module]}.alpha"] = torch.tensor(alpha)
        merged[f"{module}.weight"] = product(one, other) * (1 if alpha is None else alpha / RANK)
    return tensors, merged


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> Path:
    """Writes a file; values of `metadata` that are no text are written as JSON."""
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in (metadata or {}).items()}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        file,
        metadata=texts,
    )
    return file
