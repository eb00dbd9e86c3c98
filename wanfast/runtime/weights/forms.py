"""Reads the weights of an expert from any kind of file in the table of `store.expert_files`.

A file may hold values in three forms:

* fp8 or int8 numbers with scales. `weights/checkpoint.py` multiplies each number by its scale, in float32 on the
  device.
* blocks of GGUF. The package gguf dequantizes them into float32 on the CPU.
* plain values, which need no computation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.runtime.errors import CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.machine import host
from wanfast.runtime.store.expert_files import ExpertHeader, Stored
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.checkpoint import MergeFn, SafetensorsReader, Source, unmerged

_PIECE_VALUES = 4 << 20  # of a GGUF tensor that one thread dequantizes at a time


def source_of(files: ModelFiles, expert: Expert, ranks: int = 1, merge: MergeFn = unmerged) -> Source:
    """Returns the files of an expert's weights, and how to read these files.

    If the user gave --high-noise-expert or --low-noise-expert for this expert, its files are those of the option.
    Otherwise, they are the expert's files in the model's folder.
    `ranks`: how many ranks read at the same time; each of them uses an equal share of the CPU cores. `merge`: adds
    LoRAs to the weights. Raises WanFastError.
    """
    named = files.named(expert)
    if named is None:
        return Source(files.weights(expert), "dit", files.layout, merge=merge)
    header = named.header()
    return Source(named.files, "dit", header.layout, lambda file: _FormReader(header, file, ranks), merge)


class _FormReader:
    """Implements Reader for one file of an expert in any form; the keys are the names without a prefix."""

    def __init__(self, header: ExpertHeader, file: Path, ranks: int) -> None:
        self._ranks = ranks
        self._stored: Mapping[str, Stored] = {
            name: stored for name, stored in header.tensors.items() if stored.file == file
        }
        self._reader_of = cache(SafetensorsReader)

    def header(self) -> dict[str, tuple[list[int], str]]:
        return {
            name: (list(stored.shape), stored.dtype if stored.is_plain else "F32")
            for name, stored in self._stored.items()
        }

    def rows(self, key: str, first: int, end: int) -> Tensor:
        stored = self._stored[key]
        if stored.offset is not None:
            return _dequantized(stored, stored.offset, first, end, host.share_of_cores(self._ranks))
        return self._reader_of(stored.file).rows(stored.key, first, end)

    def scales(self, key: str, first: int, end: int) -> Tensor | None:
        scale = self._stored[key].scale
        if scale is None:
            return None
        rows = (first, end) if scale.shape and scale.shape[0] > 1 else (0, 1)
        return self._reader_of(scale.file).rows(scale.key, *rows).float().flatten()


def _dequantized(stored: Stored, offset: int, first: int, end: int, cores: int) -> Tensor:
    """Returns rows of a tensor of a GGUF file in float32; threads work on pieces of them."""
    if first == end:  # a rank of a sharded expert may hold no rows, and the package cannot dequantize none
        return torch.empty(0, *stored.shape[1:])
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType[stored.dtype]
    is_vector = len(stored.shape) == 1  # one row of blocks
    shape = (1, *stored.shape) if is_vector else stored.shape
    subject, fix = f"{stored.file}: tensor {stored.key!r}", "check the disk, or download this file again"
    with foreign(subject, fix, CorruptArtifactError):
        blocks = np.memmap(stored.file, np.uint8, "r", offset, quant_shape_to_byte_shape(shape, kind))
    own = blocks if is_vector else blocks[first:end]

    def values(piece: npt.NDArray[np.uint8]) -> Tensor:
        with np.errstate(all="ignore"):  # the loader reports values that are not finite
            return torch.from_numpy(np.array(dequantize(np.array(piece), kind), np.float32))

    pieces = np.array_split(own, max(1, min(len(own), math.prod((len(own), *shape[1:])) // _PIECE_VALUES)))
    with ThreadPoolExecutor(cores) as threads:
        read = torch.cat(list(threads.map(values, pieces)))
    return read[0, first:end] if is_vector else read
