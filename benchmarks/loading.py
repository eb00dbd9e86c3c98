"""Measures time and memory of ranks that load an expert of true size: `python benchmarks/loading.py --device cuda`.

The checkpoint comes from tests/sparse_model.py. Its files are sparse: their holes read as zeros, so that no disk is
read and no download is needed. Everything after the disk is real: page cache, copies, casts, exchanges. Each rank is a
fresh process, so that its peak memory is its own. The checkpoint holds a few known values, the marks. Loaded values are
compared with these marks, unless the expert is quantized. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
import torch.multiprocessing as mp
from spawned import on_ranks

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import sparse_model
from tests.counted_reads import counting
from wanfast.runtime.config import QuantizeConfig
from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.jobs import quantize
from wanfast.runtime.machine import packages
from wanfast.runtime.machine.packages import commit
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.quantized import QuantizedExpert
from wanfast.runtime.weights import builders, checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--ranks", type=int, default=1, help="number of ranks that share the reading; each has its own GPU"
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="shard the weights: each rank keeps only its own rows; needs several ranks"
    )
    parser.add_argument("--scheme", choices=get_args(Scheme), help="quantize the expert first, and load the result")
    parser.add_argument(
        "--experts", type=int, choices=(1, 2), default=1, help="number of experts to load; 2 loads the same file twice"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the checkpoint, which is written if it is missing; by default a temporary folder",
    )
    options = parser.parse_args()
    if options.fsdp and options.scheme:
        parser.error("--fsdp needs unquantized experts: drop --fsdp or --scheme")
    if options.fsdp and options.ranks == 1:
        parser.error("--fsdp needs several ranks: add --ranks")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:  # /tmp may be memory, which holes occupy once read
        options.folder = options.folder or Path(scratch)
        if not (options.folder / "high_noise_model").exists():
            sparse_model.write(options.folder, dataclasses.replace(A14B.dit, num_layers=options.layers))
        if options.scheme:
            wanted = QuantizeConfig(
                model=str(options.folder),
                scheme=options.scheme,
                expert="high",
                device=options.device,
                artifacts_dir=str(options.folder / "artifacts"),
            )
            mp.start_processes(
                _quantize, (wanted,), 1, start_method="spawn"
            )  # a process of its own, because children inherit peak memory
        on_ranks(_measure, options)


def _quantize(_: int, wanted: QuantizeConfig) -> None:
    print(*quantize.describe(quantize.run(wanted)), sep="\n", flush=True)


def _measure(options: argparse.Namespace) -> None:
    hardware.prepare(options.device, "bf16", None)
    with rank_group(options.device, Mesh(ulysses=options.ranks), timeout_s=300) as ranks:
        figures = ranks.gather(_load(options, ranks))
        if ranks.is_leader:
            _report(options, figures)


def _load(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    files = model_files.locate(str(options.folder), "artifacts")
    assert files.spec.dit.num_layers == options.layers, f"{options.folder} holds {files.spec.dit.num_layers} layers"
    ranks.share(torch.zeros(1, device=ranks.device))  # all ranks start together, after contexts and connections exist
    hardware.reset_peak_memory(options.device)
    read: list[int] = []
    checkpoint.SafetensorsReader.rows = counting(read)
    start = time.perf_counter()
    store = ArtifactStore(options.folder / "artifacts")
    kept = QuantizedExpert(store, files, "high_noise", options.scheme, str(options.folder)) if options.scheme else None
    models = [
        builders.build_expert(files, "high_noise", "bf16", ranks, quantized=kept, sharded=options.fsdp)
        for _ in range(options.experts)
    ]
    if options.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak_gpu = hardware.peak_memory_bytes("cuda") if options.device == "cuda" else None
    # The marks are unquantized values, so quantized ones are not checked.
    wrong = None if options.scheme else sparse_model.wrong_tensors(models[-1], ranks.rank, ranks.size)
    peak_rss = hardware.peak_memory_bytes("cpu")  # after the check, which may be the first read of some values
    return {
        "seconds": seconds,
        "read_bytes": sum(read),
        "peak_rss_bytes": peak_rss,
        "peak_gpu_bytes": peak_gpu,
        "wrong_tensors": wrong,
    }


def _report(options: argparse.Namespace, figures: list[dict[str, Any]]) -> None:
    spec = dataclasses.replace(A14B.dit, num_layers=options.layers)
    seconds = max(rank["seconds"] for rank in figures)
    held = options.experts * memory.expert_bytes(spec, "bf16", options.scheme)
    read = sum(rank["read_bytes"] for rank in figures)
    how = f"{options.experts} expert(s), {options.layers} of {A14B.dit.num_layers} layers on {options.device}, "
    how += f"{options.ranks} rank(s)"
    how += f", {options.scheme}" if options.scheme else ""
    peaks = [f"peak RSS {gb(max(rank['peak_rss_bytes'] for rank in figures))}"]
    if options.device == "cuda":
        peaks.append(f"peak GPU {gb(max(rank['peak_gpu_bytes'] for rank in figures))}")
    print(f"{how}{', FSDP' if options.fsdp else ''}: {gb(read)} in {seconds:.1f} s, {read / 1e9 / seconds:.2f} GB/s")
    print(f"{' and '.join(peaks)} per rank; the model is {gb(held)}")
    if options.scheme:
        print("quantized values are not checked: wrong_tensors is null")
    for rank, found in enumerate(figures):
        if found["wrong_tensors"]:
            print(f"rank {rank} holds wrong values in {len(found['wrong_tensors'])} tensors")
    document = {
        "layers": options.layers,
        "experts": options.experts,
        "ranks": options.ranks,
        "fsdp": options.fsdp,
        "scheme": options.scheme,
        "read_bytes": read,
        "model_bytes": held,
        "seconds": seconds,
        "gb_per_s": read / 1e9 / seconds,
        "each_rank": figures,
        "commit": commit(),
        "versions": packages.versions(),
        "hardware": hardware.describe(options.device),
    }
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
