"""Writes an expert's checkpoint of true names, shapes and dtype with holes as values: it takes almost no disk space.

Holes read as zeros, so a few values of every tensor are marks. Each mark is different and exact in bf16, and lies in a
row that ends or begins a quarter. A correct loader holds exactly the marks of its rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from wanfast.bench.model_folder import VALUE_BYTES, Shapes, write_holes
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.dit import WanDiT

_SHARD_BYTES = 9_900_000_000  # the published shards are smaller than 10 GB
_FIRST_MARK = 0x3F80  # 1.0 in bf16; the bit patterns after it are larger numbers, each one exact


def write(folder: Path, spec: DiTSpec, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes the high-noise expert in fp32, in the original layout."""
    shapes = _shapes(spec)
    target = folder / "high_noise_model"
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config(spec)))
    shards = _split(shapes, shard_bytes)
    weight_map: dict[str, str] = {}
    marks = _marks(shapes)
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (target / file).open("wb") as stream:
            _write_shard(stream, shard, marks)
    index = {"metadata": {"total_size": num_bytes(spec)}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def num_bytes(spec: DiTSpec) -> int:
    """Returns the bytes of the checkpoint's tensors."""
    return sum(map(_bytes, _shapes(spec).values()))


def wrong_tensors(model: WanDiT, rank: int = 0, ranks: int = 1) -> list[str]:
    """Returns the tensors that do not hold exactly their marks; of sharded tensors, this rank's rows are checked."""
    held = model.state_dict()
    marks = _marks(_shapes(model.spec))
    wrong = []
    for name, tensor in held.items():
        rows, own = range(tensor.shape[0]), tensor
        if isinstance(tensor, DTensor):
            share = -(-len(rows) // ranks)  # like torch.chunk: the last ranks may hold fewer rows, or none
            rows, own = rows[rank * share :][:share], tensor.to_local()
        expected = {(row - rows.start, column): value for row, column, value in marks[name] if row in rows}
        if own.shape != (len(rows), *tensor.shape[1:]) or _nonzeros(own) != expected:
            wrong.append(name)
    return wrong


def _nonzeros(tensor: Tensor) -> dict[tuple[int, int], float]:
    """Returns {(row, position in the row): value}; comparing whole words where possible is four times as fast."""
    flat = tensor.flatten()
    values_a_word = 8 // flat.itemsize
    if flat.numel() % values_a_word:
        places = flat.nonzero().flatten()
    else:
        words = flat.view(torch.int64).nonzero()
        places = (words * values_a_word + torch.arange(values_a_word, device=flat.device)).flatten()
    columns = tensor.shape[1:].numel()
    found = zip(places.tolist(), flat[places].tolist(), strict=True)
    return {divmod(place, columns): value for place, value in found if value}


def _marks(shapes: Shapes) -> dict[str, list[tuple[int, int, float]]]:
    """Returns (row along dim 0, position in the row, value) of every mark."""
    patterns: Iterator[int] = iter(range(_FIRST_MARK, 0x7F80))
    marks = {}
    for name, shape in shapes.items():
        rows, columns = shape[0], shape[1:].numel()
        edges = {i * rows // 4 + side for i in range(5) for side in (-1, 0)}
        marked = sorted(row for row in edges if 0 <= row < rows)
        marks[name] = [(row, row % columns, _bf16(next(patterns))) for row in marked]
    return marks


def _bf16(pattern: int) -> float:
    value: float = struct.unpack(">f", struct.pack(">I", pattern << 16))[0]
    return value


def _split(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(shape) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _write_shard(stream: BinaryIO, shard: Shapes, marks: dict[str, list[tuple[int, int, float]]]) -> None:
    starts = write_holes(stream, shard)
    for name, shape in shard.items():
        for row, column, value in marks[name]:
            stream.seek(starts[name] + (row * shape[1:].numel() + column) * VALUE_BYTES["F32"])
            stream.write(struct.pack("<f", value))


def _bytes(shape: torch.Size) -> int:
    return shape.numel() * VALUE_BYTES["F32"]


def _shapes(spec: DiTSpec) -> Shapes:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in WanDiT(spec).state_dict().items()}


def config(spec: DiTSpec) -> dict[str, object]:
    """Returns the sizes under the original layout's names."""
    same = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_dim", "text_len", "eps")
    return {name: getattr(spec, name) for name in same} | {"in_dim": spec.in_channels, "out_dim": spec.out_channels}
