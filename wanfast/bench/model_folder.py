"""Writes a folder for `wanfast generate --model` with a model's tensor names, shapes and layout, but other weights.

The weights of the experts and of the text encoder are either holes or random values. Holes are fp32 files that read as
zeros and take no disk space. Random values are bf16 files; their scale is chosen so that activations stay near one.
Both experts are the same file (a hard link). The VAE is random in both cases, so the decoded frames are noise. The
weights of the VAE's last layer are divided by `smoothness`: the larger `smoothness`, the weaker the noise.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from wanfast.runtime.facts.model_spec import A14B, ModelSpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.key_maps import Network, rename_back

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CHUNK = 1 << 26  # values that are made at a time
VALUE_BYTES = {"F32": 4, "BF16": 2}

Shapes = dict[str, torch.Size]


def write_model(folder: Path, spec: ModelSpec, *, is_random: bool = False, smoothness: float = 1.0) -> None:
    """Writes the model in the Diffusers layout: with random values if `is_random` is true, otherwise with zeros.

    The zeros are holes in the files and take no disk space. The VAE always has random values; `write_vae` explains
    `smoothness`. If there is a GPU, the random values of the experts and of UMT5 are drawn on the GPU.
    """
    expert, umt5 = _on_meta(spec)
    write = _write_random if is_random else _write_holes
    write(folder / "transformer" / _WEIGHTS, "dit", expert)
    (folder / "transformer_2").mkdir()
    (folder / "transformer_2" / _WEIGHTS).hardlink_to(folder / "transformer" / _WEIGHTS)
    write(folder / "text_encoder/model.safetensors", "umt5", umt5)
    write_vae(folder, spec, smoothness)
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY / "tokenizer/tokenizer.json", folder / "tokenizer")
    (folder / "wanfast.json").write_text(json.dumps(spec.to_json()))


def write_vae(folder: Path, spec: ModelSpec, smoothness: float) -> None:
    """Writes a VAE with random weights into the folder, and overwrites an earlier VAE there.

    The videos that this VAE decodes are noise. `smoothness` divides the weights of the VAE's last layer: 1 leaves them
    unchanged, and a larger number makes the noise weaker.
    """
    vae = WanVAE(spec.vae)
    randomise(vae, 0)
    vae.decoder.conv_out.weight.data /= smoothness
    checkpoint.save(vae, folder / "vae" / _WEIGHTS, network="vae", layout="diffusers")


def of_layers(layers: int) -> ModelSpec:
    """Returns the A14B's facts, but with `layers` layers in each expert, and at most `layers` layers in UMT5."""
    return dataclasses.replace(
        A14B,
        dit=dataclasses.replace(A14B.dit, num_layers=layers),
        umt5=dataclasses.replace(A14B.umt5, num_layers=min(layers, A14B.umt5.num_layers)),
    )


def random_bytes(spec: ModelSpec) -> int:
    """Returns an estimate of the bytes that a folder with random values needs, plus some space for videos."""
    values: int = sum(tensor.numel() for model in _on_meta(spec) for tensor in model.state_dict().values())
    return 2 * values + (1 << 30)  # and the VAE and the videos


def randomise(module: nn.Module, seed: int) -> None:
    """Fills EVERY parameter of `module` with random values.

    By default, some parameters are all zero or all one. Such values would hide errors: a test would pass even if the
    code never read the parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean, std = spread_of(name, parameter.shape)
        value = mean + std * torch.randn(parameter.shape, generator=generator)
        parameter.data = value.to(parameter.dtype)


def spread_of(name: str, shape: torch.Size) -> tuple[float, float]:
    """Returns (mean, standard deviation) of a parameter's random values.

    A matrix or kernel has the mean 0 and the standard deviation 1 / sqrt(fan-in). The weight of a norm has (1, 0.2).
    All other parameters, such as tables and biases, have (0, 0.3).
    """
    if "norm" in name and name.endswith(("weight", "gamma")):
        return 1.0, 0.2
    if len(shape) >= 2 and "table" not in name and "modulation" not in name:
        return 0.0, float(shape[1:].numel() ** -0.5)
    return 0.0, 0.3


def write_holes(stream: BinaryIO, shapes: Shapes, dtype: str = "F32") -> dict[str, int]:
    """Writes a safetensors file of zeros, and returns {name: the byte of the file at which the tensor starts}.

    `shapes`: {name of a tensor: its shape}. `dtype`: a type as safetensors names it, such as "BF16". The zeros are a
    hole in the file, which takes no disk space.
    """
    header, starts, end = {}, {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + shape.numel() * VALUE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's own writer aligns the values like this
    stream.write(struct.pack("<Q", len(text)) + text)
    values = stream.tell()
    stream.truncate(values + end)
    return {name: values + start for name, start in starts.items()}


def _on_meta(spec: ModelSpec) -> tuple[WanDiT, UMT5Encoder]:
    with torch.device("meta"):
        return WanDiT(spec.dit), UMT5Encoder(spec.umt5)


def _write_holes(file: Path, network: Network, model: nn.Module, dtype: str = "F32") -> dict[str, int]:
    """Writes a file that reads as zeros; returns {wanfast's name of a tensor: the byte at which the tensor starts}."""
    file.parent.mkdir(parents=True)
    keys = {rename_back(network, "diffusers", name): name for name in model.state_dict()}
    shapes = {key: model.state_dict()[name].shape for key, name in keys.items()}
    with file.open("wb") as stream:
        starts = write_holes(stream, shapes, dtype)
    return {keys[key]: start for key, start in starts.items()}


def _write_random(file: Path, network: Network, model: nn.Module) -> None:
    starts, state = _write_holes(file, network, model, "BF16"), model.state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.from_file(str(file), shared=True, size=file.stat().st_size // 2, dtype=torch.bfloat16)
    made = torch.empty(_CHUNK, dtype=torch.bfloat16, device=device)
    sent = torch.empty(_CHUNK, dtype=torch.bfloat16, pin_memory=True) if device == "cuda" else made
    generator = torch.Generator(device).manual_seed(0)
    for name, start in starts.items():
        mean, std = spread_of(name, state[name].shape)
        for part in values[start // 2 :][: state[name].numel()].split(_CHUNK):  # type: ignore[no-untyped-call]
            made[: len(part)].normal_(mean, std, generator=generator)
            part.copy_(sent[: len(part)].copy_(made[: len(part)]))
