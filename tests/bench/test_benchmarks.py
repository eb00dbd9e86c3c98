"""Runs a small form of each benchmark on a CPU, so that a benchmark is not found broken on a rented GPU.

In the fast suite, the programs run in this process. They get a narrow model, compile without Inductor, and fork where
they start processes. `make test-long` runs what this leaves out, in the quick checks of the programs' docstrings:
Inductor, diffusers, true widths and fresh processes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.results import ROOT, program
from tests.small_model import SPEC
from wanfast.runtime.facts.model_spec import A14B

NARROW = replace(A14B, dit=replace(SPEC.dit, num_layers=1), vae=SPEC.vae, umt5=SPEC.umt5)
# The words of a program, and paths of figures in the JSON document of its last line.
Form = tuple[str, list[str]]
OF_HOLES = "--layers 1 --steps 2 --size 64x64 --frames 5 --device cpu"
FAST: dict[str, Form] = {
    "forward": (
        "--tiny --layers 1 --rounds 1 --diffusers none",
        ["ways/wanfast compiled flash/ms", "ways/wanfast eager math/tflops"],
    ),
    "forward --ranks 4": (
        "--tiny --layers 1 --rounds 1 --diffusers none --ranks 4",
        ["comparison/efficiency/ulysses 2", "comparison/efficiency/ulysses 4"],
    ),
    "loading": ("--layers 1 --ranks 2", ["seconds", "read_bytes", "each_rank/1/peak_rss_bytes"]),
    "lossy": (
        "--tiny --rounds 1 --error-layers 0",
        [
            "ways/bf16 linears, sparse/ratio",
            "shares/fp8 linears, fp8, checked",
            "sampled/sparse",
            "sparsity/mean_density",
        ],
    ),
    "magcache": ("--tiny --steps 8", ["seconds/cached/0", "ratio", "share", "cost"]),
    "products": ("--tiny --rounds 1", ["ways/qkv bf16/ms", "ways/ffn.2 torch.int8/tops"]),
    "quantized": ("--tiny --rounds 1", ["ways/fp8-rowwise/ratio", "ways/int8-dynamic/error_by_layer/1"]),
    "ranks": ("--tiny --layers 1 --rounds 1", ["ways/cfg/seconds", "unguided_share", "regrouping_ms"]),
    "ranks_in_turn": ("--step --tiny --no-compile --rounds 1", ["first_s", "step_s/0", "mesh/cfg", "tokens"]),
    "second_video": (OF_HOLES, ["videos/0/waited_s", "videos/1/seconds/denoise", "close_s"]),
    "start": ("--ranks 1 --rounds 1", ["rows/0/ready_s/0", "rows/1/seconds/plan made", "rows/1/end_s/0"]),
    "vae": (
        "--size 32x32 --frames 5 --rounds 1 --device cpu",
        ["seconds/encode", "seconds/decode bf16", "psnr_db/bf16"],
    ),
    "vae --ranks 2": (
        "--size 32x32 --frames 1 --rounds 1 --device cpu --ranks 2",
        ["seconds/decode tf32, one rank", "relative_error/decode tf32"],
    ),
    "warm_start": (
        "--start --eager --tiny --size 64x64 --frames 5 --attention flash --layers 2",
        ["first_s", "step_s"],
    ),
    "whole_video": (
        "--layers 1 --size 64x64 --frames 5 --device cpu --num-gpus 2 --steps 8 --guidance-gate 0.5",
        ["seconds/denoise", "step_s/7", "guided_step_s", "unguided_share", "regrouping_s/0", "gpu_used_bytes"],
    ),
    "whole_video --random": (
        f"--random {OF_HOLES}",
        ["beyond_denoising_s/list/median", "videos/known/0/wall_s", "videos/new/0/outside_s", "videos/list/2/end_s"],
    ),
}
ON_RANKS = {"ranks": 2, "ranks_in_turn": 2}  # programs that `torchrun` starts, and on how many ranks
PARTS = {"warm_start"}  # whose fast form is one of the processes that the program starts
QUICK: dict[str, Form] = {
    "forward": ("--tiny --layers 2", ["ways/diffusers compiled sdpa/ms", "ways/wanfast compiled flash/relative_error"]),
    "forward --ranks 2": ("--tiny --layers 2 --ranks 2", ["comparison/ratio_to_diffusers", "ways/ulysses 2/ms"]),
    "lossy": ("--tiny", ["ways/bf16 linears, sparse/relative_error"]),
    "ranks_in_turn": ("--checkout . --checkout . --tiny --turns 1", ["ratio", "rows/1/step_s/2"]),
    "start": ("--ranks 2 --rounds 1", ["rows/0/seconds/group formed", "rows/1/end_s/0"]),
    "warm_start": ("--tiny", ["received/ratio", "warmup/bytes"]),
    "whole_video --random": (f"--random {OF_HOLES}", ["beyond_denoising_s/list/median"]),
}
# Other programs, and the tests that run them: most only write tables.
ELSEWHERE = {
    "attention_table": "bench/test_attention_table.py",
    "kinds_table": "bench/test_kinds_table.py",
    "projection": "bench/test_projection.py",
    "readme_table": "bench/test_readme_table.py",
    "served": "bench/test_served.py",
    "tiny_lossy": "bench/test_tiny_tables.py",
    "tiny_preset": "bench/test_tiny_tables.py",
    "tiny_tables": "bench/test_tiny_tables.py",
    "waterfall": "house/test_docs.py",
}


def at(document: Any, path: str) -> float:
    for key in path.split("/"):
        document = document[int(key) if isinstance(document, list) else key]
    return float(document)


def check(printed: str, figures: list[str], *, is_part: bool = False) -> None:
    document = json.loads(printed.strip().splitlines()[-1])
    assert [figure for figure in figures if not math.isfinite(at(document, figure))] == []
    assert is_part or "commit" in document


def test_each_benchmark_is_run() -> None:
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text()}
    assert programs == {case.split()[0] for case in FAST} | ELSEWHERE.keys()
    assert all(name in (ROOT / "tests" / file).read_text() for name, file in ELSEWHERE.items())


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None) -> Iterator[None]:
    """Lets the programs use a narrow model, fork, and compile nothing; afterwards restores the handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    spawned, commands = program("spawned"), program("commands")
    start, context = spawned.mp.start_processes, commands.mp.get_context
    monkeypatch.setattr(spawned.mp, "start_processes", lambda *given, start_method: start(*given, start_method="fork"))
    monkeypatch.setattr(commands.mp, "get_context", lambda kind: context("fork"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: None)
    for name in ("loading", "magcache", "products", "quantized", "vae"):
        monkeypatch.setattr(program(name), "A14B", NARROW)
    for name in ("commands", "second_video", "whole_video"):
        monkeypatch.setattr(program(name), "of_layers", lambda layers: NARROW)
    for name in ("second_video", "start", "whole_video"):  # forks would remove a temporary folder when they end
        kept = SimpleNamespace(TemporaryDirectory=lambda **given: nullcontext(str(tmp_path)))
        monkeypatch.setattr(program(name), "tempfile", kept)
    monkeypatch.setattr(program("whole_video"), "set_environment", lambda: None)
    monkeypatch.setenv("WANFAST_ARTIFACTS", str(tmp_path / "artifacts"))
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("case", FAST)
def test_the_last_line_holds_the_figures(
    case: str, narrow: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words, figures), name = FAST[case], case.split()[0]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split()])
    if name in ON_RANKS:
        program("spawned").on_ranks(lambda _: program(name).main(), Namespace(ranks=ON_RANKS[name]))
    else:
        program(name).main()
    printed = capfd.readouterr().out
    check(printed, figures, is_part=name in PARTS)
    if name == "whole_video":
        assert json.loads(printed.splitlines()[-1])["size"] == [64, 64, 5]  # as asked, although the picture is wider


def test_the_memory_of_a_decoder_counts_one_piece_of_the_video() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def pieces() -> Iterator[torch.Tensor]:
        for _ in range(3):
            assert sum(ref() is not None for ref in held) <= 1
            piece = torch.ones(1)
            held.append(weakref.ref(piece))
            yield piece
            del piece

    assert program("vae")._last(pieces()) is held[-1]()


@pytest.mark.long
@pytest.mark.timeout(900)  # whole_video.py has written 2.5 GB of random weights, and read them six times
@pytest.mark.parametrize("case", QUICK)
def test_the_quick_checks_of_the_docstrings_run(case: str) -> None:
    words, figures = QUICK[case]
    command = [sys.executable, str(ROOT / f"benchmarks/{case.split()[0]}.py"), *words.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    check(done.stdout, figures)
