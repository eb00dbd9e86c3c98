"""Tests which ranks work and where the weights lie, as decided from the machine before anything starts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.configs import effective_config
from tests.conftest import Machine, Outcome
from wanfast.commands import dispatch
from wanfast.runtime.device import hardware
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.model_spec import A14B, UMT5Spec
from wanfast.runtime.machine import host
from wanfast.runtime.machine.gpus import Gpu
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.planning import placement
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.processes import elastic, failures, worker

Wanfast = Callable[..., Outcome]
A14B_DRY = ("generate", "--image", "cat.png", "--prompt", "a cat", "--dry-run", "--json")
GRAPHS = ["--compile", "--compile-mode", "max-autotune"]
TINY_DRY = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--dry-run", "--json")
MADE = {"replica": 1, "cfg": 1, "ulysses": 1}
ENCODE_BYTES = memory._ENCODE_BYTES


@pytest.fixture(autouse=True)
def _vae_of_23_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the VAE need more than the loop, 23.0 GB at 720p, so that each way of holding the experts has its case."""
    monkeypatch.setattr(memory, "_ENCODE_BYTES", 260)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bytes_of_the_models_are_those_of_their_parameters(precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    with torch.device("meta"):
        expert, umt5 = WanDiT(A14B.dit, dtype), UMT5Encoder(A14B.umt5, dtype)
    assert memory.expert_bytes(A14B.dit, precision) == sum(p.nbytes for p in expert.parameters())
    assert memory.umt5_bytes(A14B.umt5, precision) == sum(p.nbytes for p in umt5.parameters())
    assert memory.umt5_bytes(UMT5Spec(), "bf16") == 11_361_820_672  # as published


def test_both_experts_and_the_vae_fit_80_gb(
    wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_ENCODE_BYTES", ENCODE_BYTES)
    machine(1, 80)
    assert "experts resident: 72.6 GB a rank" in wanfast(*A14B_DRY).document["plan"]["placement"]
    exact = wanfast(*A14B_DRY, "--vae-precision", "fp32").document["plan"]["placement"]
    assert "experts resident: 75.2 GB a rank" in exact


@pytest.mark.parametrize(
    ("gpus", "gigabytes", "options", "mesh", "dit_fsdp", "t5_fsdp", "offload", "words"),
    [
        (1, 141, [], {}, "off", "off", "off", "experts resident"),
        (1, 84, [], {}, "off", "off", "off", "experts resident: 82.5 GB a rank"),
        (1, 80, [], {}, "off", "off", "off", "experts evicting: 72.3 GB a rank instead of 82.5 GB"),
        (1, 141, GRAPHS, {}, "off", "off", "off", "resident: 94.8 GB"),
        (1, 48, [], {}, "off", "off", "on", "experts offloaded: 43.4 GB"),
        (1, 84, ["--expert-offload", "on"], {}, "off", "off", "on", "as asked"),
        (8, 80, ["--num-gpus", "8"], {"cfg": 2, "ulysses": 4}, "off", "off", "off", "experts resident"),
        (8, 80, ["--num-gpus", "auto"], {"cfg": 2, "ulysses": 4}, "off", "off", "off", "experts resident"),
        (8, 48, ["--num-gpus", "8"], {"cfg": 2, "ulysses": 4}, "on", "off", "off", "experts sharded"),
        (8, 84, ["--num-gpus", "8", "--dit-fsdp", "on"], {"cfg": 2, "ulysses": 4}, "on", "off", "off", "as asked"),
        (8, 80, ["--num-gpus", "8", "--t5-fsdp", "on"], {"cfg": 2, "ulysses": 4}, "off", "on", "off", "resident"),
        (2, 48, ["--num-gpus", "2", "--expert-offload", "on"], {"cfg": 2}, "off", "off", "on", "as asked"),
        (8, 13, ["--num-gpus", "8", "--size", "320x176"], {"cfg": 2, "ulysses": 4}, "on", "on", "off", "sharded"),
        (8, 80, ["--num-gpus", "8", "--ulysses", "8"], {"ulysses": 8}, "off", "off", "off", "experts resident"),
        (1, 60, ["--quantize", "int8-dynamic"], {}, "off", "off", "off", "experts resident: 54.5 GB"),
        (1, 60, ["--quantize", "fp8-rowwise"], {}, "off", "off", "off", "experts resident: 54.5 GB"),
        (1, 32, ["--quantize", "fp8-rowwise", "--size", "832x480"], {}, "off", "off", "on", "experts offloaded"),
        (
            8,
            48,
            ["--num-gpus", "8", "--quantize", "int8-weight-only"],
            {"cfg": 2, "ulysses": 4},
            "off",
            "off",
            "off",
            "experts resident",
        ),
        (8, 48, ["--num-gpus", "8", "--quantize", "bf16"], {"cfg": 2, "ulysses": 4}, "on", "off", "off", "sharded"),
        (8, 80, ["--num-gpus", "4", "--cfg-parallel", "1"], {"ulysses": 4}, "off", "off", "off", "resident"),
        (
            8,
            80,
            ["--num-gpus", "8", "--guidance-high-noise", "1", "--guidance-low-noise", "1"],
            {"ulysses": 8},
            *("off", "off", "off", "resident"),
        ),
    ],
)
def test_auto_decides_from_free_memory(
    wanfast: Wanfast,
    machine: Machine,
    gpus: int,
    gigabytes: float,
    options: list[str],
    mesh: dict[str, int],
    dit_fsdp: str,
    t5_fsdp: str,
    offload: str,
    words: str,
) -> None:
    machine(gpus, gigabytes)
    outcome = wanfast(*A14B_DRY, *options)
    assert outcome.exit_code == 0, outcome.err
    plan = outcome.document["plan"]
    assert plan["mesh"] == MADE | mesh
    assert (plan["dit_fsdp"], plan["t5_fsdp"], plan["expert_offload"]) == (dit_fsdp, t5_fsdp, offload)
    assert words in plan["placement"] and f"{gigabytes:.1f} GB free on each GPU" in plan["placement"]


def test_a_list_with_a_quantized_line_is_not_sharded(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(2, 62)
    (workdir / "jobs.jsonl").write_text('{}\n{"quantize": "int8-dynamic"}\n')
    list_ = ("--num-gpus", "2", "--cfg-parallel", "2", "--jobs", "jobs.jsonl")
    plans = [result["plan"] for result in wanfast(*A14B_DRY, *list_).document["results"]]
    assert [(plan["dit_fsdp"], plan["expert_offload"]) for plan in plans] == [("off", "on")] * 2
    (workdir / "jobs.jsonl").write_text("{}\n{}\n")
    plans = [result["plan"] for result in wanfast(*A14B_DRY, *list_).document["results"]]
    assert plans[0]["dit_fsdp"] == "on"


def test_graphs_of_one_line_count_for_its_list_and_on_gpus_alone(
    wanfast: Wanfast, machine: Machine, workdir: Path
) -> None:
    machine(1, 90)
    graphs = {"compile": True, "compile_mode": "max-autotune"}
    (workdir / "jobs.jsonl").write_text("{}\n" + json.dumps(graphs) + "\n")
    assert "would hold 94.8 GB" in wanfast(*A14B_DRY, "--jobs", "jobs.jsonl").err
    machine(0, 0, host_gb=2 * 60)  # a CPU has no graphs, so its experts may be sharded
    cpu = ("--device", "cpu", "--num-gpus", "2")
    assert wanfast(*A14B_DRY, *cpu, *GRAPHS).document["plan"]["dit_fsdp"] == "on"


def test_float8_needs_a_gpu_that_has_it(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Gpu("NVIDIA A100", 85_000_000_000, 85_000_000_000, "580", (8, 0), 12)
    monkeypatch.setattr(placement.gpus, "visible_gpus", lambda: [old])
    outcome = wanfast(*A14B_DRY, "--quantize", "fp8-rowwise")
    assert outcome.exit_code == 2 and "NVIDIA A100 cannot multiply in float8" in outcome.err
    assert wanfast(*A14B_DRY, "--quantize", "int8-dynamic", "--expert-offload", "off").exit_code == 0


@pytest.mark.parametrize(
    ("gpus", "gigabytes", "options", "words"),
    [
        (1, 24, [], "hold 82.5 GB (resident) or 72.3 GB (evicting) or 43.4 GB (offloaded), but only 24.0 GB are"),
        (1, 48, ["--expert-offload", "off"], "43.4 GB (offloaded: switched off)"),
        (8, 48, ["--num-gpus", "8", "--dit-fsdp", "off"], "(sharded: switched off)"),
        (1, 84, ["--dit-fsdp", "on"], "--dit-fsdp on: a video has one rank"),
        (1, 84, ["--t5-fsdp", "on"], "--t5-fsdp on needs several ranks"),
        (4, 84, ["--num-gpus", "8"], "--num-gpus 8: the number of GPUs here is 4: use --num-gpus 4"),
        (8, 84, ["--num-gpus", "8", "--ulysses", "3"], "use one of: --cfg-parallel 1 --ulysses 1, "),
        (8, 84, ["--num-gpus", "8", "--dit-fsdp", "on", "--expert-offload", "on"], "exclude each other"),
        (1, 84, ["--device", "cpu", "--expert-offload", "on"], "--expert-offload on: with --device cpu"),
        (1, 84, ["--device", "cpu", "--num-gpus", "auto"], "--num-gpus auto counts GPUs"),
        (0, 0, ["--device", "cuda", "--num-gpus", "auto"], "no GPU is visible"),
        (8, 84, ["--num-gpus", "0"], "--num-gpus 0: use 1 to 1024, or auto"),
        (8, 84, ["--num-gpus", "8", "--cfg-parallel", "0"], "--cfg-parallel 0: use 1 or more"),
        (8, 84, ["--nnodes", "2"], "--nnodes needs --rdzv-endpoint"),
        (8, 84, ["--rdzv-endpoint", "a:1"], "--rdzv-endpoint is for several machines"),
        (8, 84, ["--nnodes", "2", "--rdzv-endpoint", "a"], "is not HOST:PORT"),
        (
            8,
            84,
            ["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "a:1"],
            "--node-rank 2: with --nnodes 2, use 0 to 1",
        ),
        (8, 84, ["--rank-timeout", "0"], "--rank-timeout 0"),
        (
            1,
            84,
            GRAPHS,
            "a rank would hold 94.8 GB, including 12.3 GB for CUDA graphs, but only 84.0 GB are free: use --comp",
        ),
        (1, 141, [*GRAPHS, "--expert-offload", "on"], "max-autotune needs weights that do not move"),
        (8, 141, [*GRAPHS, "--num-gpus", "8", "--dit-fsdp", "on"], "max-autotune needs weights that do not move"),
        (1, 141, [*GRAPHS, "--dit-fsdp", "on"], "a video has one rank: add --num-gpus"),
    ],
)
def test_what_cannot_be_is_refused(
    wanfast: Wanfast, machine: Machine, gpus: int, gigabytes: float, options: list[str], words: str
) -> None:
    machine(gpus, gigabytes)
    outcome = wanfast(*A14B_DRY, *options)
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_host_too_small_for_the_idle_expert_is_said(wanfast: Wanfast, machine: Machine) -> None:
    machine(1, 48, host_gb=40)
    outcome = wanfast(*A14B_DRY)
    assert outcome.exit_code == 2
    assert "43.4 GB (offloaded: needs 63.7 GB of host memory, but only 40.0 GB are free), but only 48.0" in outcome.err
    outcome = wanfast(*A14B_DRY, "--expert-offload", "on")
    assert outcome.exit_code == 2 and "--expert-offload on: needs 63.7 GB of host memory" in outcome.err
    assert "; drop --expert-offload, so that wanfast chooses the placement" in outcome.err
    machine(8, 48, host_gb=400)  # one rank per video: each of eight would pin both experts
    lines = "\n".join(["{}"] * 8)
    Path("jobs.jsonl").write_text(lines)
    ranks = ("--num-gpus", "8", "--cfg-parallel", "1", "--ulysses", "1", "--jobs", "jobs.jsonl")
    assert "needs 509.6 GB of host memory" in wanfast(*A14B_DRY, *ranks).err
    machine(8, 48, host_gb=600)
    assert wanfast(*A14B_DRY, *ranks).document["results"][7]["plan"]["expert_offload"] == "on"


def test_experts_are_evicted_to_a_host_with_enough_memory(wanfast: Wanfast, machine: Machine) -> None:
    machine(1, 80, host_gb=2)
    refused = wanfast(*A14B_DRY)
    assert refused.exit_code == 2
    assert (
        "82.5 GB (resident) or 72.3 GB (evicting: needs 2.5 GB of host memory, but only 2.0 GB are free)" in refused.err
    )
    machine(1, 90, host_gb=2)
    assert "experts resident: 82.5 GB" in wanfast(*A14B_DRY).document["plan"]["placement"]
    groups = ("--num-gpus", "8", "--cfg-parallel", "1", "--ulysses", "1", "--jobs", "jobs.jsonl")
    Path("jobs.jsonl").write_text("{}\n" * 8)
    machine(8, 80, host_gb=19)  # for eight ranks, each with a video of its own
    assert "(evicting: needs 20.3 GB of host memory" in wanfast(*A14B_DRY, *groups).err
    machine(8, 80, host_gb=21)
    plan = wanfast(*A14B_DRY, *groups).document["results"][0]["plan"]
    assert "experts evicting" in plan["placement"]
    cpu = ("--device", "cpu", "--num-gpus", "8")  # nothing is evicted on a CPU
    machine(0, 0, host_gb=8 * 60)
    assert "experts sharded" in wanfast(*A14B_DRY, *cpu).document["plan"]["placement"]


def test_a_rank_group_may_keep_its_idle_experts_on_the_host(wanfast: Wanfast, machine: Machine) -> None:
    """Half of both experts plus the loop does not fit one of the two GPUs."""
    machine(2, 44)
    plan = wanfast(*A14B_DRY, "--num-gpus", "2").document["plan"]
    assert (plan["dit_fsdp"], plan["expert_offload"]) == ("off", "on")


def test_the_fullest_gpu_decides(wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 84)
    full = dataclasses.replace(placement.gpus.visible_gpus()[0], free_bytes=int(62e9))
    free = placement.gpus.visible_gpus()[:1]
    monkeypatch.setattr(placement.gpus, "visible_gpus", lambda: [*free, full])
    assert wanfast(*A14B_DRY, "--num-gpus", "2").document["plan"]["dit_fsdp"] == "on"
    assert wanfast(*A14B_DRY, "--num-gpus", "1").document["plan"]["dit_fsdp"] == "off"


def test_only_ranks_that_start_take_of_the_host(wanfast: Wanfast, machine: Machine) -> None:
    """Seven of eight rank groups of one rank have no video, so they pin nothing."""
    machine(8, 48, host_gb=100)
    plan = wanfast(*A14B_DRY, "--num-gpus", "8", "--cfg-parallel", "1", "--ulysses", "1").document["plan"]
    assert plan["expert_offload"] == "on"


def test_processes_on_a_cpu_share_the_host(wanfast: Wanfast, machine: Machine) -> None:
    machine(0, 0, host_gb=100)
    plan = wanfast(*TINY_DRY, "--num-gpus", "4").document["plan"]
    assert "25.0 GB of host memory free for each process" in plan["placement"]
    machine(0, 0, host_gb=200)
    assert wanfast(*A14B_DRY, "--num-gpus", "4").document["plan"]["dit_fsdp"] == "on"


def test_the_largest_video_of_a_list_decides(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(1, 70)
    assert wanfast(*A14B_DRY, "--size", "320x176").document["plan"]["expert_offload"] == "off"
    (workdir / "jobs.jsonl").write_text('{"size": "320x176"}\n{}\n')
    results = wanfast(*A14B_DRY, "--jobs", "jobs.jsonl").document["results"]
    assert [result["plan"]["expert_offload"] for result in results] == ["on", "on"]


def test_each_rank_group_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.os, "environ", {})
    monkeypatch.setattr(elastic.host, "cores", lambda: 16)
    monkeypatch.setattr(elastic.gpus, "device_ids", lambda: ["4", "5", "6", "7"])
    config = effective_config(device="cuda", num_gpus=4, cfg_parallel=2).ranks
    for replica, expected in enumerate(("4,5", "6,7")):
        elastic._set_environment(config, replica, processes=2)
        assert elastic.os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert elastic.os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        assert elastic.os.environ[name] == "4"  # a fair share of the cores
    assert elastic.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    own = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    monkeypatch.setattr(elastic.os, "environ", dict(own))
    monkeypatch.setattr(elastic.host, "cores", lambda: 256)
    elastic._set_environment(config, 0, processes=2)
    assert own.items() <= elastic.os.environ.items() and "PYTORCH_ALLOC_CONF" not in elastic.os.environ
    assert elastic.os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "32"  # no more than torch would use
    monkeypatch.setattr(elastic.os, "environ", {})
    elastic._set_environment(dataclasses.replace(config, num_gpus=1, cfg_parallel=1), 0, processes=1)
    assert "OMP_NUM_THREADS" not in elastic.os.environ


@pytest.mark.parametrize(
    ("dry", "threads", "note"),
    [
        (TINY_DRY, None, None),
        (TINY_DRY, "1", None),
        (TINY_DRY, "2", "to 2 instead of 1, and threads wait for each other"),
        ((*TINY_DRY, "--num-gpus", "2"), "8", None),
        (A14B_DRY, "16", None),
        (A14B_DRY, "9", None),
        (A14B_DRY, "2", "to 2 instead of 16, and cores stay idle"),
        (A14B_DRY, "32", "to 32 instead of 16, and threads wait for each other"),
        ((*A14B_DRY, "--device", "cuda"), "2", None),
    ],
)
def test_a_number_of_threads_that_slows_a_cpu_is_said(
    wanfast: Wanfast,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    dry: tuple[str, ...],
    threads: str | None,
    note: str | None,
) -> None:
    machine(0, 0)
    monkeypatch.setattr(host, "cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    err = wanfast(*dry).err
    assert err.count("OMP_NUM_THREADS=") == (note is not None) and (note or "") in err


@pytest.mark.parametrize("threads", [None, "3"])
def test_a_small_model_gets_one_thread_unless_the_user_says_more(
    monkeypatch: pytest.MonkeyPatch, threads: str | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(host, "cores", lambda: 8)
    monkeypatch.setattr(hardware.os, "environ", {} if threads is None else {"OMP_NUM_THREADS": threads})
    hardware.use_few_threads("cpu", 128)
    hardware.use_few_threads("cpu", 5120)
    assert asked == ([1, 8] if threads is None else [])


@pytest.mark.parametrize(("device", "expected"), [("cuda", "expandable_segments:True"), ("cpu", None)])
def test_one_rank_has_the_allocator_of_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, expected: str | None
) -> None:
    monkeypatch.setattr(elastic.os, "environ", {})
    monkeypatch.setattr(worker, "worker_half", lambda module: lambda *jobs, **options: iter(()))
    dispatch._here("generate", tmp_path, [], device, lambda *_: None, lambda *_: None)
    assert elastic.os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(("machines", "interface"), [(1, "lo"), (2, None)])
def test_ranks_of_one_machine_meet_within_it(
    monkeypatch: pytest.MonkeyPatch, machines: int, interface: str | None
) -> None:
    monkeypatch.setattr(elastic.os, "environ", {})
    elastic._set_environment(
        effective_config(nnodes=machines, rdzv_endpoint="a:1" if machines > 1 else None).ranks, 0, processes=2
    )
    assert elastic.os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_without_a_gpu_to_ask_an_h100_is_assumed_and_said(wanfast: Wanfast, machine: Machine) -> None:
    machine(0, 0)
    plan = wanfast(*A14B_DRY, "--device", "cuda", "--num-gpus", "8").document["plan"]
    assert "85.0 GB assumed for each GPU" in plan["placement"] and plan["mesh"] == MADE | {"cfg": 2, "ulysses": 4}


def test_the_tiny_model_fits_a_cpu_with_a_gigabyte(wanfast: Wanfast, machine: Machine) -> None:
    """A process had 0.61 GB at its peak; the margin of a GPU, 2.1 GB, would refuse it."""
    for host_gb, is_refused in ((1.0, False), (0.5, True)):
        machine(0, 0, host_gb=host_gb)
        assert ("a run would be refused" in wanfast(*TINY_DRY).err) == is_refused


@pytest.mark.parametrize(("host_gb", "is_short"), [(500, False), (50, True)])
def test_a_model_planned_for_the_cpu_is_said(
    wanfast: Wanfast, machine: Machine, host_gb: float, is_short: bool
) -> None:
    machine(0, 0, host_gb)
    err = wanfast(*A14B_DRY).err
    assert "no GPU was found, so the plan is for the CPU: add --device cuda to plan for GPUs" in err
    refused = "a run would be refused: no GPU was found, and on the CPU a process would hold "
    short = r"\d+\.\d GB, but only 50\.0 GB of host memory are free for each process: use a machine with a GPU"
    from_image = re.escape(refused) + short + ", or use --model tiny, which runs on any CPU"
    assert (re.search(from_image, err) is not None) == is_short
    text = wanfast("generate", "--model", "t2v-a14b", "--prompt", "a cat", "--dry-run").err
    from_text = re.escape(refused) + short + r" \(--model tiny runs on any CPU, but it needs an --image"
    assert (re.search(from_text, text) is not None) == is_short and "or use --model tiny" not in text


@pytest.mark.parametrize(
    ("ranks", "held"),
    [
        ([], "67.4 GB,"),
        (["--num-gpus", "2", "--cfg-parallel", "2"], "34.1 GB (resident)"),
        (["--num-gpus", "2", "--cfg-parallel", "2", "--dit-fsdp", "on"], "34.1 GB,"),
    ],
    ids=["one rank", "two ranks", "sharded as asked"],
)
def test_a_video_that_does_not_fit_a_cpu_is_planned_but_not_made(
    wanfast: Wanfast, machine: Machine, ranks: list[str], held: str
) -> None:
    machine(0, 0, host_gb=24)
    large = (*TINY_DRY[:-2], "--device", "cpu", "--size", "4000x4000", "--fit", "crop", *ranks)
    planned = wanfast(*large, "--dry-run", "--json")
    assert planned.exit_code == 0
    (note,) = (note for note in planned.document["plan"]["notes"] if "refused" in note)
    words = f"--device cpu: a process would hold {held}"
    assert note.startswith(f"a run would be refused: {words}") and note.endswith("use a smaller --size")
    made = wanfast(*large)
    assert made.exit_code == 2 and words in made.err and "GPUs" not in made.err, made.err
    assert len(made.err.strip().splitlines()) == 1
    machine(0, 0, host_gb=160)
    assert "refused" not in wanfast(*large, "--dry-run").err


def test_idle_ranks_are_said(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(0, 0, host_gb=100)
    outcome = wanfast(*TINY_DRY, "--device", "cpu", "--num-gpus", "8")
    assert outcome.document["plan"]["mesh"] == MADE | {"replica": 2, "cfg": 2, "ulysses": 2}
    assert "4 of 8 ranks stay idle: each video uses 4 ranks, and the number of videos is 1" in outcome.err
    (workdir / "jobs.jsonl").write_text("{}\n{}\n")
    assert "nothing to do" not in wanfast(*TINY_DRY, "--device", "cpu", "--num-gpus", "8", "--jobs", "jobs.jsonl").err


def test_one_placement_for_a_list(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(0, 0, host_gb=100)
    lines = [{"guidance_high_noise": 1.0, "guidance_low_noise": 1.0}, {}, {"num_gpus": 2}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast(*TINY_DRY, "--device", "cpu", "--num-gpus", "4", "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 6
    first, second, third = outcome.document["results"]
    assert first["plan"]["mesh"] == second["plan"]["mesh"] == MADE | {"cfg": 2, "ulysses": 2}
    assert "--num-gpus must be the same for the whole list" in third["error"]


def test_a_line_that_does_not_fit_is_refused_alone(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(1, 84)
    lines = [{}, {"size": "4096x4096"}, {"device": "cpu"}, {"seed": 3}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast(*A14B_DRY, "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 6
    errors = [result.get("error", "") for result in outcome.document["results"]]
    assert [bool(error) for error in errors] == [False, True, True, False]
    assert "84.0 GB are free" in errors[1] and "--device must be the same for the whole list" in errors[2]


def test_an_earlier_run_is_repeated_on_other_gpus_if_asked(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(8, 84)
    plan = wanfast(*A14B_DRY, "--num-gpus", "8").document
    plan["weights"] = {}
    (workdir / "old.json").write_text(json.dumps(plan))
    again = ("generate", "--from", "old.json", "--dry-run", "--json")
    assert wanfast(*again).document["plan"]["mesh"] == MADE | {"cfg": 2, "ulysses": 4}
    machine(1, 84)
    assert "the number of GPUs here is 1" in wanfast(*again).err
    assert wanfast(*again, "--num-gpus", "1").document["plan"]["mesh"] == MADE
    machine(8, 84)
    spread = json.loads(json.dumps(plan))
    spread["effective"]["ranks"] |= {"nnodes": 2, "node_rank": 1, "rdzv_endpoint": "a:1", "ulysses": 8}
    (workdir / "spread.json").write_text(json.dumps(spread))  # of two machines: here one makes what it can
    of_two = ("generate", "--from", "spread.json", "--dry-run", "--json")
    assert wanfast(*of_two).document["plan"]["mesh"] == MADE | {"cfg": 2, "ulysses": 4}
    for name in ("num_gpus", "cfg_parallel", "ulysses", "dit_fsdp"):  # of before there were ranks
        del plan["effective"]["ranks"][name]
    (workdir / "old.json").write_text(json.dumps(plan))
    assert wanfast(*again).document["plan"]["mesh"] == MADE


@pytest.mark.parametrize(
    ("done", "gave_up", "expected"),
    [
        ({0: (7, "high noise", 3), 1: (7, "high noise", 2), 2: (7, "high noise", 3)}, (), [1]),
        ({0: (7, "high noise", 3), 1: (7, "high noise", 3), 2: (7, "high noise", 3)}, (0, 2), [1]),
        ({0: (7, "high noise", 3), 2: (7, "high noise", 3)}, (0, 2), [1]),
        ({0: (7, "clip 2 of 3, x", 0), 1: (7, "clip 1 of 3, x", 4), 2: (7, "clip 2 of 3, x", 0)}, (), [1]),
        ({0: (8, "x", 0), 1: (7, "x", 4), 2: (8, "x", 0)}, (), [1]),
    ],
    ids=["behind by a step", "as far, and silent", "never began", "at the end of a clip", "at the end of a video"],
)
def test_who_hangs(
    tmp_path: Path, done: dict[int, tuple[int, str, int]], gave_up: tuple[int, ...], expected: list[int]
) -> None:
    for rank in range(3):
        own = tmp_path / f"0-{rank}"
        own.mkdir()
        (own / "pid").write_text("1")
        if rank in done:
            (own / "progress").write_text(json.dumps(dict(zip(("job", "stage", "done"), done[rank], strict=True))))
        if rank in gave_up:
            (own / "error.json").write_text("{}")
    assert failures._behind(tmp_path, 0) == expected


def test_memory_that_ranks_hold_already_is_not_counted_against_them(workdir: Path, machine: Machine) -> None:
    """A handle plans its second video with the memory that was free before its ranks loaded models."""
    given = {"image": "cat.png", "prompt": "a cat", "device": "cuda", "num_gpus": 1}
    machine(1, 84)
    plan, _ = resolve(given, writes=False)
    before = placement.measure(plan.config.ranks)
    machine(1, 25)
    (placed,) = placement.place([plan], before)
    assert placed.config.ranks.expert_offload == "off"
    with pytest.raises(ConfigError, match=r"25\.0 GB are free"):
        placement.place([plan])
