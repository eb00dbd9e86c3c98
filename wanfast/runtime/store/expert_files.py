"""Finds an expert that --high-noise-expert or --low-noise-expert names, and reads how its tensors are stored.

Such an expert is a safetensors file, a GGUF file, or a folder with safetensors files or one GGUF file. Only headers are
read here, without torch; `weights.forms` reads the values. If the file has a scale for a tensor, the tensor's values
are the stored numbers times the scale. These forms are known:

| form | scale of X.weight | what the file says about its form |
|---|---|---|
| fp32, fp16 or bf16 | none | nothing |
| ComfyUI, fp8 of 2025 | a tensor X.scale_weight: one number | a tensor `scaled_fp8` |
| ComfyUI, fp8 or int8 of 2026 | a tensor X.weight_scale: a number, or [out, 1] | a tensor X.comfy_quant, or metadata |
| lightx2v, fp8 or int8 | a tensor X.weight_scale: [out, 1] | nothing |
| GGUF | inside the blocks of X.weight | the type of each tensor |

Scales of activations (X.scale_input, X.input_scale) are dropped, because wanfast computes a scale for each token at
run time, before it multiplies matrices in 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.config.option import flag
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import EXPERTS, Expert, Layout, Scheme, in_8_bits
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.machine.packages import install
from wanfast.runtime.store.identity import digest_of
from wanfast.runtime.store.loras import Lora, expert_in, find_loras
from wanfast.runtime.store.shards import shards_in

SUFFIXES = (".safetensors", ".gguf")
_AGAIN = "download or make this file again"
_PREFIX = re.compile(r"^(?:model\.)?diffusion_model\.")
_SCALES = (".weight_scale", ".scale_weight")
_DROPPED = re.compile(r"(?:.*\.(?:input_scale|scale_input|comfy_quant)|scaled_fp8)")
_MARK, _MARKS = ".comfy_quant", "_quantization_metadata"
# The formats of marks whose values are stored numbers times a scale, and how safetensors names their numbers.
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_FLOATS = ("F32", "F16", "BF16")
# The schemes that take such numbers and their scales as they are.
_TAKEN_BY: Mapping[str, tuple[Scheme, ...]] = {
    "F8_E4M3": ("fp8-rowwise",),
    "I8": ("int8-dynamic", "int8-weight-only"),
}


class NamesExperts(Protocol):
    """This interface stands for any config that may name files of experts."""

    @property
    def high_noise_expert(self) -> str | None: ...
    @property
    def low_noise_expert(self) -> str | None: ...


@dataclass(frozen=True)
class NamedExpert:
    """This class pairs an expert with the file or folder that --high-noise-expert or --low-noise-expert names."""

    expert: Expert
    path: Path

    @property
    def flag(self) -> str:
        return flag(f"{self.expert}_expert")

    @property
    def subject(self) -> str:
        return f"{self.flag} {self.path}"

    def words(self) -> tuple[str, str]:
        """Returns the option and the path that name this expert on the command line."""
        return self.flag, str(self.path)

    @property
    def files(self) -> list[Path]:
        """Returns the files of the expert. Raises ConfigError if the path does not hold the weights of one expert."""
        fix = f"give a file that ends in {' or '.join(SUFFIXES)}, or a folder with such files"
        with foreign(self.subject, fix):
            exists, is_folder, in_gguf = self.path.exists(), self.path.is_dir(), sorted(self.path.glob("*.gguf"))
        found = (shards_in(self.path) or in_gguf) if is_folder else [self.path]
        if not exists:
            raise ConfigError(f"{self.subject}: no such file: check the path")
        if not found or any(file.suffix not in SUFFIXES for file in found):
            raise ConfigError(f"{self.subject}: no weights that can be read: {fix}")
        if len(found) > 1 and found[0].suffix == ".gguf":
            raise ConfigError(f"{self.subject}: this folder holds {len(found)} .gguf files: give one of them")
        return found

    def header(self) -> ExpertHeader:
        """Returns how the expert's tensors are stored; reads only the headers of the files.

        Raises ConfigError if no weights are found, or if a GGUF file needs the package gguf. Raises
        CorruptArtifactError if a file is damaged, or if the form of a tensor is not known.
        """
        return _header(self)

    def digest(self, artifacts: Path) -> str:
        """Returns one hash over the contents of this expert's files.

        `artifacts`: the artifacts folder, which remembers the hashes of large files. Raises ConfigError if a file
        cannot be read.
        """
        return digest_of(self.files, artifacts, self.flag)

    def check(self, scheme: Scheme | None, loras: Iterable[Lora], option: str, without: str) -> None:
        """Raises WanFastError if this expert cannot be used with `scheme` and `loras`.

        Three things are refused:
        * The name of the file or folder mentions the other expert.
        * The file holds weights in float8 (e4m3) or int8, and `scheme` is an 8-bit scheme that cannot take these
          numbers as they are. It would round the weights a second time.
        * The file holds such weights, `scheme` is an 8-bit scheme, and one of the `loras` changes this expert. The
          merged weights would be rounded a second time.

        Also raises the errors of `header`. `option` and `without` are words for the error's message: the option that
        gives the scheme, such as "--quantize", and a way to avoid the scheme, such as "drop --quantize".
        """
        if (named := expert_in(self.path.name)) not in (None, self.expert):
            fix = f"use {flag(f'{named}_expert')}, or rename the file"
            raise ConfigError(f"{self.subject}: the file's name mentions the other expert: {fix}")
        kinds = [kind for kind in self.header().rounded if kind in _TAKEN_BY]
        if not in_8_bits(scheme) or not kinds:
            return
        if wrong := next((kind for kind in kinds if scheme not in _TAKEN_BY[kind]), None):
            why = f"its weights are stored as {wrong}, and {option} {scheme} would round them a second time"
            raise ConfigError(f"{self.subject}: {why}: use {option} {_TAKEN_BY[wrong][0]}, or {without}")
        if lora := next((lora for lora in loras if lora.has_expert(self.expert)), None):
            why = f"{self.flag} has weights in 8 bits, and quantizing after the merge would round them a second time"
            raise ConfigError(f"{lora.flag} {lora.file}: {why}: {without}, or use an expert in fp16 or bf16")


def named_experts(config: NamesExperts) -> tuple[NamedExpert, ...]:
    """Returns the experts that a config names, the high-noise one first."""
    paths = zip(EXPERTS, (config.high_noise_expert, config.low_noise_expert), strict=True)
    return tuple(NamedExpert(expert, Path(path)) for expert, path in paths if path is not None)


def identified(models: ModelsConfig) -> ModelsConfig:
    """Checks the files of experts and LoRAs that a config names, and returns the config with the hashes of these files.

    The checks need only the names and the headers of the files; only the hashes need all bytes. Raises ConfigError or
    CorruptArtifactError.
    """
    artifacts, experts = Path(models.artifacts_dir), named_experts(models)
    loras = find_loras(models, artifacts)
    for expert in experts:
        expert.check(models.quantize, loras, "--quantize", "drop --quantize")
    return dataclasses.replace(
        models,
        expert_sha256=tuple(expert.digest(artifacts) for expert in experts),
        lora_sha256=tuple(lora.sha256 for lora in loras),
    )


def expert_notes(models: ModelsConfig) -> list[str]:
    """Returns a note for each expert file that holds rounded weights, if the scheme of --quantize rounds them again."""
    if not in_8_bits(models.quantize):
        return []
    return [
        f"{expert.flag} {expert.path.name}: its weights ({expert.header().form}) are dequantized, and --quantize "
        f"{models.quantize} rounds them a second time"
        for expert in named_experts(models)
        if not _TAKEN_BY.keys() >= {*expert.header().rounded}
    ]


@dataclass(frozen=True)
class Stored:
    """This class says how a tensor is stored, and where its scale is stored, if it has one."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors or GGUF names it
    offset: int | None = None  # of its bytes in a GGUF file
    scale: Stored | None = None

    @property
    def is_plain(self) -> bool:
        """Returns whether the values are stored as they are: without a scale, and not in GGUF."""
        return self.offset is None and self.scale is None


@dataclass(frozen=True)
class ExpertHeader:
    """This class says for each tensor of an expert how the tensor is stored.

    `tensors` is {name: how the tensor is stored}. These names lack the prefix `diffusion_model.` or
    `model.diffusion_model.`, which some files put before each name.
    """

    tensors: Mapping[str, Stored]

    @property
    def layout(self) -> Layout:
        return "diffusers" if any(name.startswith("condition_embedder.") for name in self.tensors) else "original"

    @property
    def rounded(self) -> list[str]:
        """Returns the dtypes of the stored tensors, except fp32, fp16 and bf16."""
        return sorted({stored.dtype for stored in self.tensors.values()} - {*_FLOATS})

    @property
    def form(self) -> str:
        """Returns a few words on how the weights are stored, such as "F8_E4M3, scaled by row"."""
        weights = [stored for stored in self.tensors.values() if len(stored.shape) > 1]
        gguf = "GGUF " if any(stored.offset is not None for stored in weights) else ""
        scales = {"row" if math.prod(stored.scale.shape) > 1 else "tensor" for stored in weights if stored.scale}
        by = f", scaled by {' and '.join(sorted(scales))}" if scales else ""
        return gguf + " ".join(sorted({stored.dtype for stored in weights})) + by


@remembered
def _header(named: NamedExpert) -> ExpertHeader:
    found: dict[str, Stored] = {}
    marks: dict[str, Any] = {}
    for file in named.files:
        subject = f"{named.flag} {file}"
        for stored in (_read_gguf if file.suffix == ".gguf" else _read_safetensors)(file, subject, marks):
            name = _PREFIX.sub("", stored.key)
            if name in found:
                raise CorruptArtifactError(
                    f"{subject}: tensor {stored.key!r} is present twice: give the files of one expert only"
                )
            found[name] = stored
    return ExpertHeader(_with_scales(found, marks, named.subject))


def _read_safetensors(file: Path, subject: str, marks: dict[str, Any]) -> Iterator[Stored]:
    """Yields the tensors of a safetensors file; adds {layer: mark} to `marks`."""
    with (
        foreign(subject, f"it is damaged, or is not a safetensors file: {_AGAIN}", CorruptArtifactError),
        safe_open(file, framework="np") as handle,
    ):
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        facts = {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}
        own = {key: json.loads(handle.get_tensor(key).tobytes()) for key in slices if key.endswith(_MARK)}
        layers = dict(json.loads((handle.metadata() or {}).get(_MARKS, "{}")).get("layers", {}))
    named = {key.removesuffix(_MARK): mark for key, mark in own.items()}
    marks |= {_PREFIX.sub("", layer): mark for layer, mark in (named | layers).items()}
    yield from (Stored(file, key, shape, dtype) for key, (shape, dtype) in facts.items())


def _read_gguf(file: Path, subject: str, marks: dict[str, Any]) -> Iterator[Stored]:
    """Yields the tensors of a GGUF file, whose dimensions stand in the file from the last to the first."""
    if find_spec("gguf") is None:
        raise ConfigError(f"{subject}: reading GGUF needs the package gguf: run `{install('gguf')}`")
    from gguf import GGUFReader

    with foreign(subject, f"it is damaged, or is not a GGUF file: {_AGAIN}", CorruptArtifactError):
        facts = [(each, tuple(map(int, reversed(each.shape)))) for each in GGUFReader(file).tensors]
    tensors = [Stored(file, each.name, shape, each.tensor_type.name, each.data_offset) for each, shape in facts]
    kinds = {stored.dtype: stored for stored in tensors}
    for kind in sorted(kinds.keys() - _readable(kinds)):
        fix = "use a file in Q8_0, Q6_K, Q5_K or Q4_K"
        raise CorruptArtifactError(
            f"{subject}: tensor {kinds[kind].key!r} is stored as {kind}, which the package gguf cannot read: {fix}"
        )
    yield from tensors


def _readable(kinds: Iterable[str]) -> set[str]:
    """Returns the types of GGUF that the package gguf dequantizes; it has no list of them, so a block is tried."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found = set()
    for kind in kinds:
        quantization = GGMLQuantizationType[kind]
        _, block_bytes = GGML_QUANT_SIZES[quantization]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
        except NotImplementedError:
            continue
        found.add(kind)
    return found


def _with_scales(found: Mapping[str, Stored], marks: Mapping[str, Any], subject: str) -> dict[str, Stored]:
    """Returns the tensors of the model, each with its scale. Raises CorruptArtifactError."""

    def refuse(stored: Stored, why: str, fix: str = _AGAIN) -> CorruptArtifactError:
        return CorruptArtifactError(f"{subject}: tensor {stored.key!r} {why}: {fix}")

    _check_marks(found, marks, subject)
    scales: dict[str, Stored] = {}
    tensors = {}
    for name, stored in found.items():
        ending = next(filter(name.endswith, _SCALES), None)
        if ending is None:
            if not _DROPPED.fullmatch(name):
                tensors[name] = stored
            continue
        weight = f"{name.removesuffix(ending)}.weight"
        if weight not in found:
            raise refuse(stored, "is a scale without a weight")
        if weight in scales:
            raise refuse(stored, f"is a second scale of {found[weight].key!r}")
        rows = found[weight].shape[:1]
        if math.prod(stored.shape) != 1 and stored.shape not in (rows, (*rows, 1)):
            fix = "use a file with one scale for each tensor or for each row"
            raise refuse(stored, f"has the shape {list(stored.shape)}: one number, or one for each row, is needed", fix)
        if stored.dtype not in _FLOATS:
            raise refuse(stored, f"is stored as {stored.dtype}, not {' or '.join(_FLOATS)}")
        scales[weight] = stored
    for name, stored in tensors.items():
        if stored.offset is None and stored.dtype in _FORMATS.values() and name not in scales:
            why = f"is stored as {stored.dtype} without a scale, so that its values are unknown"
            raise refuse(stored, why, "use a scaled file, or one in fp16 or bf16")
    return {name: dataclasses.replace(stored, scale=scales.get(name)) for name, stored in tensors.items()}


def _check_marks(found: Mapping[str, Stored], marks: Mapping[str, Any], subject: str) -> None:
    """Raises CorruptArtifactError if a layer is marked with a format that is more than numbers times a scale."""
    for layer, mark in marks.items():
        mark = mark if isinstance(mark, dict) else {}
        changed = [
            name for name, value in mark.items() if value and name not in ("format", "full_precision_matrix_mult")
        ]
        stored = found.get(f"{layer}.weight")
        if stored is None or changed or _FORMATS.get(mark.get("format", "")) != stored.dtype:
            known = ", ".join(_FORMATS)
            words = ", ".join([str(mark.get("format")), *changed])
            kept = f"is stored as {stored.dtype}" if stored else "has no weight in the file"
            raise CorruptArtifactError(
                f"{subject}: layer {layer!r} {kept}, but its comfy_quant entry says {words!r:.80}, which wanfast "
                "cannot read: use a file in fp16 or bf16, or a file whose comfy_quant entries all hold one of these "
                f"formats: {known}"
            )
