"""Tests what one or two GPUs can show of ranks and placement; skipped with fewer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome
from tests.parity import likeness
from tests.processes.test_launch import Start, start, with_fault

__all__ = ["start"]

Wanfast = Callable[..., Outcome]
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--device", "cuda")

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@one_gpu
def test_offloaded_experts_make_the_same_file(wanfast: Wanfast, workdir: Path) -> None:
    (workdir / "jobs.jsonl").write_text('{"output": "a.mp4"}\n{"output": "b.mp4"}\n')  # high-noise returns for b
    made = {}
    for offload in ("off", "on"):
        outcome = wanfast(*GOOD, "--expert-offload", offload, "--jobs", "jobs.jsonl", "--overwrite")
        assert outcome.exit_code == 0, outcome.err
        made[offload] = [(workdir / name).read_bytes() for name in ("a.mp4", "b.mp4")]
    assert made["on"] == made["off"]
    assert json.loads((workdir / "b.json").read_text())["effective"]["ranks"]["expert_offload"] == "on"


@two_gpus
@pytest.mark.parametrize(
    "options",
    [["--cfg-parallel", "2"], ["--ulysses", "2"], ["--dit-fsdp", "on", "--t5-fsdp", "on"]],
    ids=["cfg", "ulysses", "fsdp"],
)
def test_two_gpus_make_the_video_of_one(wanfast: Wanfast, workdir: Path, options: list[str]) -> None:
    for name, ranks in (("one", []), ("two", ["--num-gpus", "2", *options])):
        outcome = wanfast(*GOOD, "--precision", "fp32", "--output", f"{name}.mp4", *ranks)
        assert outcome.exit_code == 0, outcome.err
    assert printed_likeness() >= 45  # float32 rounding changes a few blocks in the encoder


@two_gpus
def test_cuda_graphs_hold_exchanges_and_are_freed(wanfast: Wanfast, workdir: Path) -> None:
    graphs = ("--num-gpus", "2", "--ulysses", "2", "--compile", "--compile-mode", "max-autotune")
    for name, options in (("one", ()), ("two", graphs)):
        assert wanfast(*GOOD, "--output", f"{name}.mp4", *options).exit_code == 0
    assert printed_likeness() >= 35  # rounding in bf16


# Once in the encoder and once in the decoder, between two exchanges with the other rank.
NO_MEMORY = """
import collections, torch
from wanfast.runtime.models import vae
forward, calls = vae.AttentionBlock.forward, collections.Counter()
def failing(self, x, *others):
    if not x.is_meta:
        calls[self] += 1
        if calls[self] == 2:
            print("no memory", flush=True)
            raise torch.OutOfMemoryError("too large")
    return forward(self, x, *others)
vae.AttentionBlock.forward = failing
"""


@two_gpus
def test_memory_that_runs_out_on_one_gpu_changes_nothing(start: Start, workdir: Path) -> None:
    for name, environment in (("plain", None), ("again", with_fault(workdir, NO_MEMORY, rank=1))):
        run = start(*GOOD[1:], "--num-gpus", "2", "--output", f"{name}.mp4", environment=environment, forked=False)
        code, _, err = run.end(200)
        assert code == 0, err
    assert (workdir / "again.mp4").read_bytes() == (workdir / "plain.mp4").read_bytes()
    logs = [
        log.read_text().count("no memory") for log in workdir.glob("artifacts/runs/*/logs/*/attempt_0/1/stdout.log")
    ]
    assert sorted(logs) == [0, 2]


def printed_likeness() -> float:
    """Returns and prints the PSNR of the two ranks' video to one rank's, in dB."""
    found = likeness("two.mp4", "one.mp4")
    print({name: json.loads(Path(f"{name}.json").read_text())["seconds"] for name in ("one", "two")}, found)
    return found
