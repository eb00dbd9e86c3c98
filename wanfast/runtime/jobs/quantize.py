"""Quantizes experts a few rows at a time, and stores each expert as an artifact; `wanfast quantize` runs this module.

The source and the result are never completely in memory. The source is read in parts, and the result is written in
shards of 1 GiB. Every shard is read back and compared with the values in memory. Each expert is an artifact of its own.
Therefore, after an interrupted run, the next run makes only the missing experts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanfast.runtime.config import QuantizeConfig
from wanfast.runtime.errors import ConfigError, CorruptArtifactError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS, Expert, in_8_bits
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.machine import packages
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.quantized import dequantize
from wanfast.runtime.planning.devices import default_device
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore, write_synced
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.loras import find_loras
from wanfast.runtime.store.quantized import INDEX, KIND, QuantizedExpert, require_torchao, shards
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.checkpoint import TensorRows
from wanfast.runtime.weights.forms import source_of
from wanfast.runtime.weights.lora import merge_of
from wanfast.runtime.weights.quantization import is_quantized, quantize, scale_of

SHARD_BYTES = 1 << 30
_CHUNK_VALUES = 16 << 20  # values of a weight that are quantized at a time: 64 MB in float32
_WORST = 10

_EXPERTS: dict[str, tuple[Expert, ...]] = {
    "both": EXPERTS,
    "high": EXPERTS[:1],
    "low": EXPERTS[1:],
}

BytesFn = Callable[[Expert, int, int], None]  # (expert, bytes of the source that are read, all its bytes)


def run(
    config: QuantizeConfig,
    progress: BytesFn = lambda expert, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Quantizes the requested experts that are not stored yet; returns a result document for each requested expert.

    `progress(expert, done, total)` is called while an expert is quantized; `done` of the `total` bytes of its weights
    are read. `say(note)` is called if another process is quantizing the same expert and this process waits for it.
    Raises WanFastError if an expert cannot be read, quantized or stored.
    """
    files = model_files.locate_for(config)
    torchao = require_torchao(f"--scheme {config.scheme}") if in_8_bits(config.scheme) else None
    if find_spec("matplotlib") is None:
        raise ConfigError(f"the plot of quantization errors needs matplotlib: run `{packages.install('plots')}`")
    if not files.exists:
        files.require()
    device = config.device or default_device()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU on this machine: use --device cpu")
    store = ArtifactStore(Path(config.artifacts_dir))
    loras = find_loras(config, store.root)
    for named in files.experts:
        named.check(config.scheme, loras, "--scheme", "use --scheme bf16")
    for expert in _EXPERTS[config.expert]:
        merge_of(loras, expert, files.spec.dit)  # refuses a LoRA before any expert is quantized
    wanted = [
        QuantizedExpert(store, files, expert, config.scheme, config.model, loras) for expert in _EXPERTS[config.expert]
    ]
    return [_quantize_expert(expert, torchao, device, progress, say) for expert in wanted]


def _quantize_expert(
    wanted: QuantizedExpert, torchao: str | None, device: str, progress: BytesFn, say: Callable[[str], None]
) -> dict[str, Any]:
    started = time.perf_counter()
    inputs = wanted.inputs(torchao, device)
    folder, made_here = wanted.store.find(KIND, inputs, verify=True, again="run this command again"), False
    source_bytes = sum(file.stat().st_size for file in wanted.files.weights(wanted.expert))
    if folder is None:
        job = _Job(wanted, source_bytes, device, progress)
        note = f"note: another process is quantizing {wanted.expert} with {wanted.scheme}: waiting until it ends"
        published = wanted.store.publish(KIND, inputs, job.write, packages.versions(), waiting=lambda: say(note))
        folder, made_here = published.folder, published.made_here
    errors = read_object(folder / "errors.json", "remove the folder of this file, and run this command again")
    return {
        "expert": wanted.expert,
        "scheme": wanted.scheme,
        "output": str(folder),
        "was_there": not made_here,
        "source_bytes": source_bytes,
        "bytes": sum(file.stat().st_size for file in shards(folder)),
        "seconds": round(time.perf_counter() - started, 3),
        "worst": errors["worst"],
        "relative_error": errors["relative_error"],
    }


def _check_disk(wanted: QuantizedExpert) -> None:
    needed = int(memory.expert_bytes(wanted.files.spec.dit, "bf16", wanted.scheme) * 1.01)
    root = wanted.store.root
    if (free := shutil.disk_usage(root).free) < needed:
        fix = "free some disk space, or give another --artifacts-dir"
        raise ConfigError(f"--artifacts-dir {root}: {gb(needed)} on disk are needed, but {gb(free)} are free: {fix}")


@dataclass(frozen=True)
class _Job:
    """This class quantizes one expert into a folder."""

    wanted: QuantizedExpert
    source_bytes: int
    device: str
    progress: BytesFn

    def write(self, folder: Path) -> None:
        _check_disk(self.wanted)
        with torch.device("meta"):
            model = WanDiT(self.wanted.files.spec.dit, torch.bfloat16)
        held, writer, errors, read = model.state_dict(), _Shards(folder), _Errors(), 0
        merge = merge_of(self.wanted.loras, self.wanted.expert, self.wanted.files.spec.dit)
        source = source_of(self.wanted.files, self.wanted.expert, merge=merge)
        for name, rows in checkpoint.stream(model, source):
            like = held[name]
            if in_8_bits(self.wanted.scheme) and is_quantized(name):
                values, scale = self._quantized(name, rows, like, errors)
                writer.add(name, values)
                writer.add(scale_of(name), scale)
            else:
                exact = rows(0, like.shape[0] if like.dim() else 1)
                cast = exact.to(like.dtype, copy=True)
                writer.add(name, cast)
                if is_quantized(name):
                    errors.add(name, exact.float(), cast.float())
            read += like.numel() * self.source_bytes // sum(tensor.numel() for tensor in held.values())
            self.progress(self.wanted.expert, min(read, self.source_bytes), self.source_bytes)
        writer.close()
        self.progress(self.wanted.expert, self.source_bytes, self.source_bytes)
        errors.write(folder, f"{self.wanted.expert}, {self.wanted.scheme}")

    def _quantized(self, name: str, rows: TensorRows, like: Tensor, errors: _Errors) -> tuple[Tensor, Tensor]:
        """Returns a weight's values and scales, a few rows at a time: those that the file stores, or computed ones."""
        parts = []
        step = max(1, _CHUNK_VALUES // like.shape[1])
        for first in range(0, like.shape[0], step):
            span = first, min(first + step, like.shape[0])
            exact = rows(*span).to(self.device)
            values, scale = rows.taken(*span, self.wanted.scheme) or quantize(exact, self.wanted.scheme)
            errors.add(name, exact.float(), dequantize(values, scale).to(self.device))
            parts.append((values.cpu(), scale.cpu()))
        return torch.cat([values for values, _ in parts]), torch.cat([scale for _, scale in parts])


@dataclass
class _Shards:
    """Writes tensors in safetensors files of about SHARD_BYTES as the tensors come, and their index at the end."""

    folder: Path
    pending: dict[str, Tensor] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    written: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.pending[name] = tensor.contiguous()
        if sum(tensor.nbytes for tensor in self.pending.values()) >= SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        if self.pending:
            self._flush()
        index = {"metadata": {"total_size": self.written}, "weight_map": self.weight_map}
        write_synced(self.folder / INDEX, json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        file = self.folder / f"diffusion_pytorch_model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        try:
            save_file(self.pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            if "I/O error" not in str(error):
                raise
            raise OSError(None, str(error)) from error  # an error of the disk, in the words of safetensors
        self._verify(file)
        self.weight_map |= dict.fromkeys(self.pending, file.name)
        self.written += sum(tensor.nbytes for tensor in self.pending.values())
        self.pending = {}

    def _verify(self, file: Path) -> None:
        """Raises CorruptArtifactError if the file does not read back as it was written."""
        with safe_open(file, framework="pt") as handle:
            for name, tensor in self.pending.items():
                if not torch.equal(_bytes(handle.get_tensor(name)), _bytes(tensor)):
                    raise CorruptArtifactError(
                        f"{file}: tensor {name}: the values on disk are not those that were written: check the disk"
                    )


@dataclass
class _Errors:
    """Collects the relative error ||exact - quantized|| / ||exact|| of every quantized tensor."""

    squares: dict[str, list[float]] = field(default_factory=dict)  # of the error, of the tensor

    def add(self, name: str, exact: Tensor, quantized: Tensor) -> None:
        sums = self.squares.setdefault(name, [0.0, 0.0])
        sums[0] += _sum_of_squares(exact - quantized)
        sums[1] += _sum_of_squares(exact)

    def write(self, folder: Path, title: str) -> None:
        found = {name: _ratio(*sums) for name, sums in self.squares.items()}
        worst = dict(sorted(found.items(), key=lambda item: -item[1])[:_WORST])
        whole = _ratio(*(sum(sums[i] for sums in self.squares.values()) for i in (0, 1)))
        document = {"relative_error": whole, "worst": worst, "tensors": found}
        write_synced(folder / "errors.json", json.dumps(document, indent=1) + "\n")
        _plot(found, folder / "errors.png", title)


def _sum_of_squares(rows: Tensor) -> float:
    """Returns the sum of squares: in float32 within a row, in float64 over the rows.

    This takes a sixth of the time of float64 and is exact enough.
    """
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _ratio(error: float, whole: float) -> float:
    return (error / whole) ** 0.5 if whole else 0.0


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _plot(found: dict[str, float], file: Path, title: str) -> None:
    """Plots the errors over the blocks, one line for each kind of linear."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, dict[int, float]] = {}
    for name, error in found.items():
        _, block, kind = name.removesuffix(".weight").split(".", 2)
        lines.setdefault(kind, {})[int(block)] = error
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, errors in lines.items():
        axes.plot(list(errors), list(errors.values()), marker=".", label=kind)
    axes.set(title=title, xlabel="block", ylabel="relative error of the weight", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(file, dpi=110)


def describe(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yields two lines of text for each document from `run`: the result, and the name of the plot's file."""
    for result in results:
        size = f"{gb(result['source_bytes'])} -> {gb(result['bytes'])}"
        how = "was made already" if result["was_there"] else f"{size} in {result['seconds']:.0f} s"
        error = f"relative error of the weights {result['relative_error']:.2g}"
        yield f"{result['output']}: {result['expert']} with {result['scheme']}, {how}; {error}"
        yield f"{result['output']}/errors.png: the error of each layer"
