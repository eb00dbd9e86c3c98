"""This module loads and saves weights: safetensors files, or the two `.pth` files of the original layout.

A module is built on the meta device, where its parameters have names, shapes and dtypes but no values. `load` fills the
parameters one by one: it reads the values from the memory-mapped file, moves them to the device, and casts them to the
parameter's dtype. Memory holds only one copy of the model, even if the file has another dtype than the module.
The ranks of a rank group share the reading. If a parameter is sharded, each rank reads its own rows. If a large
parameter is not sharded, each rank reads a part of it, and the ranks exchange the parts. Ranks on GPUs exchange no
parts of weights that stay on the host: each rank reads them whole, and the page cache holds what another rank has read.
A Reader reads one file. Most files store plain values. Some files store numbers and scales, and a value is a number
times its scale. If the numbers have the 8-bit dtype of the module's quantized layers, and no LoRA is merged, the
numbers and the scales are loaded unchanged.
Loading is strict: a tensor that is missing, unexpected or duplicate is an error. A tensor with a wrong shape, a wrong
dtype or a value that is not finite is an error too. The error names the tensor and the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wanfast.runtime.device import staging
from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.distributed.fsdp import from_own_rows, is_sharded, own_rows
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import Layout, Scheme
from wanfast.runtime.machine import host
from wanfast.runtime.models.quantized import PRODUCTS, QuantizedLinear
from wanfast.runtime.weights.key_maps import Network, rename, rename_back
from wanfast.runtime.weights.quantization import quantize, scale_of

Finite = dict[tuple[Path, str], Tensor]  # {(file, key): whether all its values are finite}
# (our name, rows as they were read, their first and end) -> (the rows to load, what else was read)
MergeFn = Callable[[str, Tensor, tuple[int, int]], tuple[Tensor, Finite]]

# A file may hold weights in these dtypes, and they are cast to the module's. Others mean nothing without their scales.
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES = PLAIN | {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}  # what safetensors calls them
_WORTH_SHARING = 1 << 20  # values: for fewer, an exchange costs more than reading


def unmerged(name: str, rows: Tensor, span: tuple[int, int]) -> tuple[Tensor, Finite]:
    """Returns (`rows`, {}). This function is the default of `merge`. It adds no LoRA."""
    return rows, {}


class Reader(Protocol):
    """This interface reads the tensors of one file."""

    def header(self) -> Mapping[str, tuple[list[int], str]]:
        """Returns {name of a tensor in the file: (shape, dtype)}; dtypes have safetensors' names, such as "BF16".

        The dtype is "F32" for a tensor with scales, and for each tensor of a GGUF file.
        """
        ...

    def rows(self, key: str, first: int, end: int) -> Tensor:
        """Returns the rows first..end-1 of tensor `key` along dim 0, on the CPU; a scalar is returned whole.

        The rows have the dtype of the file, and are not multiplied by their scales. Rows of a GGUF file are an
        exception: they are dequantized to float32.
        """
        ...

    def scales(self, key: str, first: int, end: int) -> Tensor | None:
        """Returns the float32 scales of the rows first..end-1 of tensor `key`, or None if the tensor has no scales.

        The result is [1] if the tensor has one scale, and [end - first] if it has one scale for each row.
        """
        ...


ReaderFn = Callable[[Path], Reader]


def plain_reader(file: Path) -> Reader:
    """Returns a Reader of a `.pth` or `.safetensors` file that stores plain values."""
    return _PthReader(file) if file.suffix == ".pth" else SafetensorsReader(file)


@dataclass(frozen=True)
class Source:
    """This class says which files hold a module's weights, and how the weights are read from these files."""

    files: Sequence[Path]
    network: Network
    layout: Layout  # with `network`: how the files name the tensors
    reader: ReaderFn = plain_reader  # returns the Reader of a file
    merge: MergeFn = unmerged  # adds LoRAs to the values, before they are cast or quantized


def load(
    module: nn.Module, source: Source, ranks: Ranks, *, device: str | None = None, on_the_fly: bool = False
) -> None:
    """Fills the parameters of `module` from `source`, and prepares `module` for inference.

    `module` is on the meta device. Each parameter keeps its dtype: the values from the files are cast. All `ranks` must
    call this function together. The parameters go to `device`, by default the rank's device. With `on_the_fly`, the
    files hold unquantized weights, and the weights of quantized layers are quantized while they are read.
    Raises CorruptArtifactError if the files do not fit `module`, are damaged, or hold a value that is not finite.
    """
    wanted = module.state_dict()
    quantizing = _schemes(module, wanted) if on_the_fly else {}
    read = _read(wanted, quantizing, source, ranks, device or ranks.device)
    module.load_state_dict(dict(read), strict=True, assign=True)
    module.requires_grad_(False).eval()


def refill(
    module: nn.Module,
    held: Mapping[str, Tensor],
    source: Source,
    ranks: Ranks,
    *,
    device: str | None,
    on_the_fly: bool,
) -> None:
    """Overwrites the weights of a loaded `module` in place with those of `source`.

    `held`: {name in the module's state dict: tensor}, with all tensors of `module`. The other arguments are those of
    `load`.
    Raises CorruptArtifactError as `load` does. After this error, some tensors may be overwritten and others not.
    Therefore, `module` must be loaded again.
    """
    quantizing = _schemes(module, held) if on_the_fly else {}
    for name, tensor in _read(held, quantizing, source, ranks, device or ranks.device):
        held[name].copy_(tensor)


def _read(
    wanted: Mapping[str, Tensor],
    quantizing: Mapping[str, Scheme],
    source: Source,
    ranks: Ranks,
    device: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, what this rank holds of it) of each wanted tensor, which only says its shape and dtype.

    Raises CorruptArtifactError, at the end for values that are not finite.
    """
    places = ranks.together(lambda: _match(_to_read(wanted, quantizing), source))
    finite: Finite = {}
    parts = {name: _own_part(tensor, ranks, device) for name, tensor in wanted.items()}
    mapped = ((tensor, tensor.rows(*parts[tensor.name].rows)) for tensor in _in_order_of_files(places, source))
    for tensor, stored in staging.to_device(mapped, device, host.share_of_cores(ranks.mesh.size)):
        name, part, scheme = tensor.name, parts[tensor.name], quantizing.get(tensor.name)
        scales = tensor.scales(*part.rows)
        quantized = _taken(stored, scales, scheme) if source.merge is unmerged else None
        if quantized is not None:
            finite[tensor.place] = all_finite(quantized[0]) & all_finite(quantized[1])
        else:
            read = _dequantized(stored, scales)
            merged, others = source.merge(name, read, part.rows)
            finite |= {tensor.place: all_finite(read), **others}
            quantized = quantize(merged, scheme) if scheme else None
        if quantized is not None:
            values, scale = quantized
            yield name, part.whole(values, ranks)
            yield scale_of(name), part.whole(scale, ranks)
        else:  # cast where it is fast; copy on a CPU, because a view keeps the file mapped
            own = merged.to(wanted[name].dtype, copy=read.device.type == "cpu")
            yield name, part.whole(own, ranks)
    ranks.together(lambda: _require_finite(finite))


def stream(module: nn.Module, source: Source) -> Iterator[tuple[str, TensorRows]]:
    """Yields (name, a TensorRows that reads the tensor) for each tensor of `module`, file by file.

    `module` is on the meta device; only its names, shapes and dtypes are used. Raises CorruptArtifactError if the files
    do not fit `module`.
    """
    for tensor in _in_order_of_files(_match(_to_read(module.state_dict(), {}), source), source):
        yield tensor.name, TensorRows(tensor, source.merge)


@dataclass(frozen=True)
class TensorRows:
    """This class reads rows of one tensor on the CPU: call it with (first, end).

    The field `merge` is the function that adds LoRAs to the rows; the function `unmerged` adds none.
    """

    tensor: _Tensor
    merge: MergeFn

    def __call__(self, first: int, end: int) -> Tensor:
        """Returns the rows first..end-1 along dim 0, in the dtype of the file or in float32.

        Raises CorruptArtifactError if the file is damaged or a value is not finite.
        """
        read = _dequantized(self.tensor.rows(first, end), self.tensor.scales(first, end))
        merged, others = self.merge(self.tensor.name, read, (first, end))
        _require_finite({self.tensor.place: all_finite(read), **others})
        return merged

    def taken(self, first: int, end: int, scheme: Scheme) -> tuple[Tensor, Tensor] | None:
        """Returns the stored 8-bit values [n, K] and float32 scales [n] of the n rows first..end-1.

        If the file stores one scale for the whole tensor, this scale is repeated n times. Returns None if the tensor
        has no scales, if its dtype is not the 8-bit dtype of `scheme`, or if `merge` is not `unmerged`.
        """
        if self.merge is not unmerged:
            return None
        return _taken(self.tensor.rows(first, end), self.tensor.scales(first, end), scheme)


def _dequantized(stored: Tensor, scales: Tensor | None) -> Tensor:
    """Returns the values of rows: the stored ones, or in float32 the stored ones times the scales of their rows."""
    if scales is None:
        return stored
    return stored.float() * scales.to(stored.device).view(-1, *[1] * (stored.dim() - 1))


def _taken(stored: Tensor, scales: Tensor | None, scheme: Scheme | None) -> tuple[Tensor, Tensor] | None:
    """Returns (8-bit values [n, K], float32 scales [n]) that a scheme takes as they are, or None."""
    if scheme is None or scales is None or stored.dtype != PRODUCTS[scheme][0]:
        return None
    values = stored.clone() if stored.device.type == "cpu" else stored  # a view keeps the file mapped
    return values, scales.to(stored.device).expand(stored.shape[0]).contiguous()


def _require_finite(finite: Finite) -> None:
    """Raises CorruptArtifactError for the first (file, key) whose flag is false; waits once for all flags."""
    if bool(torch.stack(list(finite.values())).all()):
        return
    file, key = next(place for place, flag in finite.items() if not flag)
    raise CorruptArtifactError(f"{file}: tensor {key!r} holds NaN or an infinity: download or make this file again")


@dataclass(frozen=True)
class _Tensor:
    """Names one tensor of a file, which `reader` reads."""

    file: Path
    key: str
    name: str  # ours
    reader: Reader

    @property
    def place(self) -> tuple[Path, str]:
        return self.file, self.key

    def rows(self, first: int, end: int) -> Tensor:
        return self.reader.rows(self.key, first, end)

    def scales(self, first: int, end: int) -> Tensor | None:
        return self.reader.scales(self.key, first, end)


def _in_order_of_files(places: dict[Path, dict[str, str]], source: Source) -> Iterator[_Tensor]:
    for file, names in places.items():
        reader = source.reader(file)
        for name, key in names.items():
            yield _Tensor(file, key, name, reader)


@dataclass(frozen=True)
class _Part:
    """Describes the rows of a parameter that this rank reads."""

    wanted: Tensor
    rows: tuple[int, int]
    is_shared: bool  # every rank reads a part, and all hold the whole

    def whole(self, rows: Tensor, ranks: Ranks) -> Tensor:
        """Returns the parameter, made of `rows`, the rows that this rank read.

        If the parameter is sharded, the result is a DTensor that holds `rows` on this rank. Otherwise the result is
        the whole tensor. All ranks must call this method together.
        """
        return ranks.gather_rows(rows) if self.is_shared else from_own_rows(rows, self.wanted)


def _own_part(wanted: Tensor, ranks: Ranks, device: str) -> _Part:
    """Returns the part that this rank reads, so that as few ranks as possible read the same bytes.

    Ranks on GPUs whose weights stay on the host share nothing, because the page cache is faster than their exchange.
    """
    first, end = own_rows(wanted)
    is_worth_sharing = device == ranks.device and wanted.numel() >= _WORTH_SHARING
    if is_sharded(wanted) or not is_worth_sharing or end % ranks.size:
        return _Part(wanted, (first, end), is_shared=False)
    return _Part(wanted, (ranks.rank * end // ranks.size, (ranks.rank + 1) * end // ranks.size), is_shared=True)


def _schemes(module: nn.Module, names: Collection[str]) -> dict[str, Scheme]:
    """Returns {weight: scheme} of the linears that the module holds quantized; `names` are those of its tensors."""
    scheme = next((m.scheme for m in module.modules() if isinstance(m, QuantizedLinear)), None)
    return {name: scheme for name in names if scale_of(name) in names} if scheme else {}


@dataclass(frozen=True)
class _Wanted:
    """Describes a tensor that the files must hold."""

    shape: list[int]
    dtypes: Set[str]  # the names that safetensors has for them


def _to_read(wanted: Mapping[str, Tensor], quantizing: Mapping[str, Scheme]) -> dict[str, _Wanted]:
    """Returns the tensors that are read: weights to be quantized are plain in the files, and have no scales there."""
    scales, plain = {scale_of(name) for name in quantizing}, set(PLAIN.values())
    return {
        name: _Wanted(list(tensor.shape), plain if _is_plain(name, tensor, quantizing) else {_NAMES[tensor.dtype]})
        for name, tensor in wanted.items()
        if name not in scales
    }


def _is_plain(name: str, tensor: Tensor, quantizing: Mapping[str, Scheme]) -> bool:
    return name in quantizing or tensor.dtype in PLAIN


def _match(wanted: Mapping[str, _Wanted], source: Source) -> dict[Path, dict[str, str]]:
    """Returns {file: {our name: its key}} for every tensor, from headers only. Raises CorruptArtifactError."""
    files, network, layout = source.files, source.network, source.layout
    places: dict[Path, dict[str, str]] = {}
    found: set[str] = set()
    for file in files:
        places[file] = {}
        for key, (shape, dtype) in source.reader(file).header().items():
            name = rename(network, layout, key)
            if (network, layout, key) == ("umt5", "diffusers", "encoder.embed_tokens.weight"):
                continue  # the same tensor as shared.weight, written twice by some versions of transformers
            if name not in wanted:
                raise CorruptArtifactError(
                    f"{file}: unexpected tensor {key!r}: replace this file with weights of this model"
                )
            if name in found:
                raise CorruptArtifactError(f"{file}: tensor {key!r} is present twice: download the folder again")
            if shape != wanted[name].shape:
                shapes = f"{shape}, not {wanted[name].shape}"
                raise CorruptArtifactError(
                    f"{file}: tensor {key!r} has the shape {shapes}: replace this file with weights of this model"
                )
            if dtype not in wanted[name].dtypes:
                raise CorruptArtifactError(
                    f"{file}: tensor {key!r} is stored as {dtype}, not {' or '.join(sorted(wanted[name].dtypes))}: use "
                    "the published weights, and quantize them with `wanfast quantize`"
                )
            found.add(name)
            places[file][name] = key
    if missing := sorted(wanted.keys() - found):
        where = files[0] if len(files) == 1 else files[0].parent
        key = rename_back(network, layout, missing[0])
        raise CorruptArtifactError(
            f"{where}: missing tensor {key!r} ({len(missing)} missing in all): download {where.name} again"
        )
    return places


def save(module: nn.Module, file: Path, *, network: Network, layout: Layout, dtype: torch.dtype | None = None) -> None:
    """Writes the tensors of `module` to a `.pth` or `.safetensors` file, under the names of `layout`.

    The tensors are cast to `dtype`. If `dtype` is None, each tensor keeps its dtype.
    """
    tensors = {
        rename_back(network, layout, name): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pth":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # save_file makes it readable only by its owner


_AGAIN = "it is truncated, damaged or cannot be read; download it again"
_REMAP_BYTES = 1 << 30


class SafetensorsReader:
    """This Reader reads a memory-mapped safetensors file.

    Whenever another gigabyte has been read, the file is mapped again. This frees the memory of the pages that were
    read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: Any = None
        self._bytes_read = 0

    def header(self) -> dict[str, tuple[list[int], str]]:
        with _open(self.file) as handle, foreign(str(self.file), _AGAIN, CorruptArtifactError):
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
            return {key: (each.get_shape(), each.get_dtype()) for key, each in slices.items()}

    def scales(self, key: str, first: int, end: int) -> None:
        return None

    def rows(self, key: str, first: int, end: int | None) -> Tensor:
        if self._handle is None or self._bytes_read > _REMAP_BYTES:
            self._handle, self._bytes_read = _open(self.file), 0
        with foreign(
            f"{self.file}: tensor {key!r}", "check the disk, or download this file again", CorruptArtifactError
        ):
            part = self._handle.get_slice(key)
            rows: Tensor = part[first:end] if part.get_shape() else self._handle.get_tensor(key)
        self._bytes_read += rows.nbytes
        return rows


class _PthReader:
    """Reads a `.pth` file in the same way as SafetensorsReader, with a new mapping after each gigabyte."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors: dict[str, Tensor] = {}
        self._bytes_read = 0

    def header(self) -> dict[str, tuple[list[int], str]]:
        return {
            key: (list(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype)))
            for key, tensor in _read_pth(self.file).items()
        }

    def scales(self, key: str, first: int, end: int) -> None:
        return None

    def rows(self, key: str, first: int, end: int) -> Tensor:
        if not self._tensors or self._bytes_read > _REMAP_BYTES:
            self._tensors, self._bytes_read = _read_pth(self.file), 0
        tensor = self._tensors[key]
        rows = tensor[first:end] if tensor.dim() else tensor
        self._bytes_read += rows.nbytes
        return rows


def _open(file: Path) -> Any:
    with foreign(str(file), _AGAIN, CorruptArtifactError):
        return safe_open(file, framework="pt")


def _read_pth(file: Path) -> dict[str, Tensor]:
    """Reads a pickle of tensors only: nothing in the pickle is run."""
    with foreign(str(file), _AGAIN, CorruptArtifactError):
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    if not isinstance(state, dict) or not all(_is_stored(key, tensor) for key, tensor in state.items()):
        raise CorruptArtifactError(f"{file} does not hold a dictionary of plain tensors: download it again")
    return state


def _is_stored(key: Any, tensor: Any) -> bool:
    """Returns whether a pickle's entry is a plain tensor with its values in the file."""
    if not (isinstance(key, str) and isinstance(tensor, Tensor)):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
