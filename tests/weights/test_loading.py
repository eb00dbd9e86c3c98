"""Tests that weights of true size load in little memory, and that the ranks of a rank group share the reading."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests import sparse_model
from tests.on_ranks import on_ranks
from tests.sharded import whole
from wanfast.runtime.distributed import fsdp
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.store import model_files
from wanfast.runtime.weights import builders, checkpoint

ROOT = Path(__file__).parents[2]
TRUE_SIZES = dataclasses.replace(A14B.dit, num_layers=2)
SMALL = DiTSpec(dim=1280, ffn_dim=2048, freq_dim=256, num_heads=10, num_layers=2, text_dim=1024)


@pytest.fixture
def true_sizes() -> Iterator[Path]:
    """Writes a checkpoint of 3.7 GB that takes a few MB; /tmp may be memory, which holes occupy once read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        sparse_model.write(Path(folder), TRUE_SIZES, shard_bytes=3_000_000_000)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_true_sizes_load_in_little_more_memory_than_the_model(
    true_sizes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ranks: int
) -> None:
    """Checks that no rank holds a whole shard, a second precision or its peer's weights: each is 0.7 GB or more.

    A process that holds no weights takes 1 GB.
    """
    shards = sorted(true_sizes.glob("*/*.safetensors"))
    sizes = [shard.stat() for shard in shards]
    assert len(shards) > 1 and min(size.st_size for size in sizes) > 0.7e9
    assert sum(size.st_size for size in sizes) > 3.5e9
    assert sum(size.st_blocks * 512 for size in sizes) < 20e6

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    held = memory.expert_bytes(TRUE_SIZES, "bf16")
    options = ["--fsdp"] if ranks > 1 else []
    document = measured(capfd, "--folder", str(true_sizes), "--ranks", str(ranks), *options)
    assert document["read_bytes"] == sparse_model.num_bytes(TRUE_SIZES)
    for figures in document["each_rank"]:
        assert figures["wrong_tensors"] == []
        assert figures["peak_rss_bytes"] <= held / ranks + 1.6e9


def measured(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Returns the JSON of the loading benchmark, whose ranks are fresh processes with their own peak memory."""
    loading = importlib.import_module("loading")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["loading.py", "--layers", str(TRUE_SIZES.num_layers), *options])
        loading.main()
    out = capfd.readouterr().out
    print(out)
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def test_a_rank_group_reads_each_byte_about_once(tmp_path: Path, bytes_read: list[int]) -> None:
    sparse_model.write(tmp_path, SMALL, shard_bytes=50_000_000)
    files = model_files.locate(str(tmp_path), "artifacts")
    assert files.spec.dit == SMALL and len(files.weights("high_noise")) > 2

    def work(ranks: Ranks, sharded: bool) -> tuple[int, list[str]]:
        model = builders.build_expert(files, "high_noise", "bf16", ranks, sharded=sharded)
        return sum(bytes_read), sparse_model.wrong_tensors(model, ranks.rank, ranks.size)

    total = sparse_model.num_bytes(SMALL)
    assert work(Ranks("cpu"), sharded=False) == (total, [])
    bytes_read.clear()
    for sharded in (False, True):
        for read, wrong in on_ranks(Mesh(ulysses=2), lambda ranks: work(ranks, sharded)):  # noqa: B023 - run at once
            print(f"2 ranks, FSDP {sharded}: {read / total:.3f} of {total / 1e6:.0f} MB read by one")
            assert not wrong
            assert total / 2 * 0.99 < read < total / 2 * 1.05  # every rank reads small tensors itself


def test_ranks_whose_weights_stay_on_the_host_exchange_nothing(tmp_path: Path, bytes_read: list[int]) -> None:
    """Each rank reads the whole expert, because the page cache is faster than an exchange between processes."""
    sparse_model.write(tmp_path, SMALL, shard_bytes=50_000_000)
    files = model_files.locate(str(tmp_path), "artifacts")

    def work(ranks: Ranks) -> tuple[int, list[str]]:
        on_gpus = dataclasses.replace(ranks, device="cuda")
        model = builders.build_expert(files, "high_noise", "bf16", on_gpus, device="cpu")
        return sum(bytes_read), sparse_model.wrong_tensors(model, 0, 1)

    assert on_ranks(Mesh(ulysses=2), work) == [(sparse_model.num_bytes(SMALL), [])] * 2


class Odd(nn.Module):
    """Holds tensors that ranks do not divide: fewer rows than ranks, one row, none."""

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        large = checkpoint._WORTH_SHARING
        self.blocks = nn.ModuleList([nn.Linear(3, 7), nn.Linear(5, 2), nn.LayerNorm(1)])
        self.many = nn.Parameter(torch.empty(large + 1))
        self.shared = nn.Parameter(torch.empty(12, large // 8, dtype=torch.bfloat16))
        self.uneven = nn.Parameter(torch.empty(5, large // 4, dtype=torch.bfloat16))
        if scalar:
            self.scalar = nn.Parameter(torch.empty(()))


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (3, False), (4, False), (3, True), (4, True)])
def test_rows_that_the_ranks_do_not_divide(tmp_path: Path, ranks: int, sharded: bool) -> None:
    file = tmp_path / "odd.safetensors"
    torch.manual_seed(0)
    scalar = not sharded  # FSDP accepts no scalar
    stored = {name: torch.randn(tensor.shape) for name, tensor in Odd(scalar).state_dict().items()}
    save_file(stored, file)

    def work(own: Ranks) -> list[str]:
        with torch.device("meta"):
            module = Odd(scalar)
        if sharded:
            fsdp.shard(module, "cpu")
        checkpoint.load(module, checkpoint.Source([file], "dit", "original"), own)
        held = {name: whole(tensor) for name, tensor in module.state_dict().items()}
        return [name for name, tensor in held.items() if not torch.equal(tensor, stored[name].to(tensor.dtype))]

    results = [work(Ranks("cpu"))] if ranks == 1 else on_ranks(Mesh(ulysses=ranks), work)
    assert results == [[]] * ranks


def test_what_was_loaded_needs_its_file_no_more(tmp_path: Path) -> None:
    """On the CPU a float32 tensor could stay a view of the file: always mapped, and changed with the file."""
    file = tmp_path / "odd.safetensors"
    values = {name: torch.ones(tensor.shape) for name, tensor in Odd(scalar=True).state_dict().items()}
    save_file(values, file)
    with torch.device("meta"):
        module = Odd(scalar=True)
    checkpoint.load(module, checkpoint.Source([file], "dit", "original"), Ranks("cpu"))
    save_file({name: tensor * 2 for name, tensor in values.items()}, tmp_path / "other.safetensors")
    file.write_bytes((tmp_path / "other.safetensors").read_bytes())
    assert all(bool((tensor == 1).all()) for tensor in module.state_dict().values())
