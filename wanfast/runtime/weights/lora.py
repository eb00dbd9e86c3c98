"""Merges LoRA files into an expert's weights while the weights are loaded, so that forwards take no more time.

    weight += strength * alpha / rank * up @ down        (without alpha: strength * up @ down)
    weight += strength * difference                      (for tensors X.diff of the file, which have the weight's shape)

Products and sums are computed in float32, one tensor at a time; then the sum is cast or quantized. If only some rows of
a weight are loaded, only the same rows of `up` are read. Before a weight is read, all keys and shapes are compared with
those of the model.
Alpha is a tensor of the file. If there is none, alpha is a number in PEFT's config beside the file, or in the file's
metadata. If PEFT's config says that the LoRA is rank-stabilised, this number is divided by sqrt(rank), not by rank.
Source: LoRA (arXiv 2106.09685); rank-stabilised LoRA (arXiv 2312.03732).

Shapes: N out, K in, r rank; down [r, K], up [N, r]. A convolution's factors have more dimensions, which are flattened.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.device.meta import on_meta
from wanfast.runtime.errors import CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store.loras import Lora, LoraHeader, read_header
from wanfast.runtime.weights.checkpoint import PLAIN, Finite, MergeFn, SafetensorsReader, unmerged
from wanfast.runtime.weights.key_maps import LoraPart, lora_part, lora_spellings

_OF_THIS_MODEL = "use a LoRA of this model"
_AGAIN = "download or make this file again"
# The names of alpha in the metadata of tools that write no JSON.
_ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha")
_DIFFERENCES: tuple[LoraPart, ...] = ("diff", "diff_b", "diff_m")
_PEFT_METADATA = "lora_adapter_metadata"  # Diffusers stores PEFT's config there


@dataclass(frozen=True)
class _Change:
    """Describes what a file adds to a tensor: `scale` times a stored tensor, or times the product of two of them."""

    reader: SafetensorsReader
    scale: float
    keys: tuple[str, ...]  # (difference,) or (up, down)

    def add_to(self, sums: Tensor, span: tuple[int, int]) -> Finite:
        """Adds the LoRA to some rows of a weight, in place.

        `sums`: the rows in float32. `span`: (first row, row after the last row). Returns {(LoRA file, key of a tensor):
        whether all values of the tensor are finite} for each tensor of the LoRA file that was read.
        """
        first, *others = (self._read(key, each, sums) for key, each in zip(self.keys, (span, None), strict=False))
        if others:
            with _full_float32():
                sums.flatten(1).addmm_(first.float().flatten(1), others[0].float().flatten(1), alpha=self.scale)
        else:
            sums.add_(first.float(), alpha=self.scale)
        read = zip(self.keys, (first, *others), strict=True)
        return {(self.reader.file, key): all_finite(tensor) for key, tensor in read}

    def _read(self, key: str, span: tuple[int, int] | None, like: Tensor) -> Tensor:
        return self.reader.rows(key, *span or (0, None)).to(like.device)


def merge_of(loras: Iterable[Lora], expert: Expert, spec: DiTSpec) -> MergeFn:
    """Returns the function that adds an expert's LoRAs to the expert's weights.

    Reads the headers and the alphas of the LoRA files, and compares all keys and shapes with those of the model.
    Raises CorruptArtifactError.
    """
    loras = [lora for lora in loras if lora.has_expert(expert)]
    if not loras:
        return unmerged
    with on_meta():
        shapes = {name: list(tensor.shape) for name, tensor in WanDiT(spec).state_dict().items()}
    spellings = lora_spellings(shapes)
    changes: dict[str, list[_Change]] = defaultdict(list)
    for lora in loras:
        for name, change in _File(lora, expert, spellings, shapes).changes():
            changes[name].append(change)
    return partial(_merged, changes)


def _merged(
    changes: Mapping[str, list[_Change]], name: str, rows: Tensor, span: tuple[int, int]
) -> tuple[Tensor, Finite]:
    """Implements MergeFn for these changes."""
    if name not in changes:
        return rows, {}
    sums = rows.to(torch.float32, copy=True)
    finite: Finite = {}
    for change in changes[name]:
        finite |= change.add_to(sums, span)
    return sums, finite


@contextmanager
def _full_float32() -> Iterator[None]:
    """Computes products in float32 in the `with` block, also with --tf32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class _File:
    """Matches the tensors of one LoRA file with the parameters of an expert."""

    def __init__(
        self, lora: Lora, expert: Expert, spellings: Mapping[str, str], shapes: Mapping[str, list[int]]
    ) -> None:
        self._lora, self._spellings, self._model = lora, spellings, shapes
        self._header = read_header(lora.file, lora.flag)
        self._keys = self._header.of_expert(expert)
        self._reader = SafetensorsReader(lora.file)

    def changes(self) -> Iterator[tuple[str, _Change]]:
        """Yields (our name of a parameter, what the file adds to it). Raises CorruptArtifactError."""
        scale_of = _Scale(self._lora, self._header, self._keys)
        for path, parts in self._parts().items():
            keys = {part: key for part, (key, _) in parts.items()}
            if "up" in keys or "down" in keys:
                rank = self._require_factors(parts)
                alpha = self._alpha(keys["alpha"]) if "alpha" in keys else None
                scale = self._lora.strength * scale_of(path, rank, alpha)
                yield parts["up"][1], self._change(scale, keys["up"], keys["down"])
                if "up_bias" in keys:
                    yield self._plain("up_bias", parts, scale)
            elif "up_bias" in keys or keys.keys() == {"alpha"}:
                self._refuse(next(iter(keys.values())), "belongs to LoRA factors that are missing", _AGAIN)
            for part in _DIFFERENCES:
                if part in keys:
                    yield self._plain(part, parts, self._lora.strength)

    def _parts(self) -> dict[str, dict[LoraPart, tuple[str, str]]]:
        """Returns {module's path in the file: {part: (key, our name of the parameter)}}."""
        found: dict[str, dict[LoraPart, tuple[str, str]]] = defaultdict(dict)
        taken: dict[tuple[LoraPart, str], str] = {}
        for key in self._keys:
            match = lora_part(key, self._spellings)
            if match is None:
                self._refuse(key, "matches nothing in this model", _OF_THIS_MODEL)
            path, part, name = match
            if (part, name) in taken:
                self._refuse(key, f"is for the same weight as {taken[part, name]!r}", _AGAIN)
            taken[part, name] = key
            found[path][part] = key, name
            if part != "alpha" and (dtype := self._header.tensors[key][1]) not in PLAIN.values():
                self._refuse(key, f"is stored as {dtype}", f"store it as {' or '.join(PLAIN.values())}")
        return found

    def _require_factors(self, parts: Mapping[LoraPart, tuple[str, str]]) -> int:
        """Returns the rank of a module's two factors, whose shapes fit each other and the weight."""
        if not {"up", "down"} <= parts.keys():
            found = parts["up" if "up" in parts else "down"][0]
            self._refuse(found, "is one of two LoRA factors, and the other factor is missing", _AGAIN)
        (up_key, name), (down_key, _) = parts["up"], parts["down"]
        up, down, weight = self._shape(up_key), self._shape(down_key), self._model[name]
        rank = down[0] if down else 0
        if not rank or up[1:2] != [rank] or math.prod(up[2:]) != 1:
            self._refuse(
                up_key, f"has the shape {up}, but {down_key!r} has the shape {down}: their ranks differ", _AGAIN
            )
        if len(weight) < 2 or up[0] != weight[0] or math.prod(down[1:]) != math.prod(weight[1:]):
            shapes = f"[{up[0]}, {math.prod(down[1:])}], but the weight has the shape {weight}"
            self._refuse(up_key, f"and {down_key!r} give a change of the shape {shapes}", _OF_THIS_MODEL)
        return rank

    def _plain(self, part: LoraPart, parts: Mapping[LoraPart, tuple[str, str]], scale: float) -> tuple[str, _Change]:
        key, name = parts[part]
        if self._shape(key) != self._model[name]:
            self._refuse(key, f"has the shape {self._shape(key)}, not {self._model[name]}", _OF_THIS_MODEL)
        return name, self._change(scale, key)

    def _change(self, scale: float, *keys: str) -> _Change:
        return _Change(self._reader, scale, keys)

    def _alpha(self, key: str) -> float:
        if math.prod(self._shape(key)) != 1:
            self._refuse(key, f"has the shape {self._shape(key)}: alpha must be one number", _AGAIN)
        alpha = float(self._reader.rows(key, 0, 1))
        if not math.isfinite(alpha):
            self._refuse(key, "is not finite", _AGAIN)
        return alpha

    def _shape(self, key: str) -> list[int]:
        return self._header.tensors[key][0]

    def _refuse(self, key: str, why: str, fix: str) -> NoReturn:
        raise CorruptArtifactError(f"{self._lora.flag} {self._lora.file}: tensor {key!r} {why}: {fix}")


class _Scale:
    """Computes the factor of a module's product, from its alpha tensor or from what the file says of all modules."""

    def __init__(self, lora: Lora, header: LoraHeader, keys: list[str]) -> None:
        self._subject, self._header, self._keys = f"{lora.flag} {lora.file}: its metadata", header, keys

    def __call__(self, path: str, rank: int, own_alpha: float | None) -> float:
        if own_alpha is not None:
            return own_alpha / rank
        stated, patterns, is_stabilised = self._stated
        alpha = next((alpha for pattern, alpha in patterns if pattern.match(path)), stated)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if is_stabilised else rank)

    @cached_property
    def _stated(self) -> tuple[float | None, list[tuple[re.Pattern[str], float]], bool]:
        """Returns (alpha, alphas by patterns of modules, whether the square root of the rank divides alpha)."""
        metadata, beside = self._header.metadata, self._header.config
        prefix = "" if beside else f"{self._keys[0].partition('.')[0]}."  # "transformer." or "transformer_2."
        with foreign(self._subject, _AGAIN, CorruptArtifactError):
            text = beside.read_text(encoding="utf-8") if beside else metadata.get(_PEFT_METADATA, "{}")
            config: dict[str, Any] = {
                name.removeprefix(prefix): value for name, value in json.loads(text).items() if name.startswith(prefix)
            }
            found = [metadata.get(name) for name in _ALPHAS]
            stated = [float(alpha) for alpha in (config.get("lora_alpha"), *found) if alpha is not None]
            patterns = [
                (re.compile(rf"(?:.*\.)?(?:{pattern})$"), float(alpha))
                for pattern, alpha in (config.get("alpha_pattern") or {}).items()
            ]
        if not all(map(math.isfinite, [*stated, *(alpha for _, alpha in patterns)])):
            raise CorruptArtifactError(f"{self._subject}: alpha is not finite: {_AGAIN}")
        return stated[0] if stated else None, patterns, bool(config.get("use_rslora"))
