"""Tests `wanfast doctor` on simulated machines: what fits, the next command, and that this command runs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import Outcome
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS, Scheme, in_8_bits
from wanfast.runtime.machine import gpus, host, packages
from wanfast.runtime.machine.gpus import Gpu
from wanfast.runtime.store import model_files, quantized
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.model_files import TINY, checkpoints
from wanfast.runtime.store.quantized import QuantizedExpert

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())

Wanfast = Callable[..., Outcome]
Machine = Callable[..., None]


@pytest.fixture
def _vae_of_23_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the VAE need more than the loop, 23.0 GB at 720p, so that each way of holding the experts has its case."""
    monkeypatch.setattr(memory, "_ENCODE_BYTES", 260)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Returns `machine(free, ...)`, which simulates GPUs with these free GB; torch sees them but runs no kernel."""

    def pretend(*free_gb: float, host_gb: float = 100, sees_gpu: bool = True) -> None:
        found = [Gpu("H100", int(gb * 1e9), int(gb * 1e9), "580.82", (9, 0), 18) for gb in free_gb]
        monkeypatch.setattr(gpus, "visible_gpus", lambda: found)
        monkeypatch.setattr(host, "available_host_bytes", lambda: int(host_gb * 1e9))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu and bool(found))

    return pretend


def pretend_weights(artifacts: Path) -> Path:
    """Writes every file of the A14B that the command needs, nearly all of them empty."""
    root = artifacts / checkpoints("a14b", "original")
    for name in ("high_noise_model/a.safetensors", "low_noise_model/a.safetensors", "Wan2.1_VAE.pth",
                 "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    shutil.copy(TINY / "tokenizer/tokenizer.json", root / "google/umt5-xxl/tokenizer.json")
    return root


def pretend_kept(artifacts: Path, scheme: Scheme) -> None:
    """Writes artifacts of both experts of `pretend_weights`, without content."""
    store, files = ArtifactStore(artifacts), model_files.locate("a14b", str(artifacts))
    for expert in EXPERTS:
        wanted = QuantizedExpert(store, files, expert, scheme, "a14b")
        made_by = quantized.torchao_version() if in_8_bits(scheme) else None
        store.publish("quantized", wanted.inputs(made_by, "cuda"), lambda folder: (folder / "file").touch())


def examine(wanfast: Wanfast, *arguments: str) -> dict[str, Any]:
    outcome = wanfast("doctor", *arguments, "--json")
    assert outcome.exit_code == 0, outcome.err
    return outcome.document


def dry_run(wanfast: Wanfast, command: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plan of a command line."""
    program, *words = shlex.split(command)
    assert program == "wanfast" and words[0] == "generate"
    for option in without:
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    assert words[words.index("--output") + 1] in ("star.mp4", "cat.mp4")
    outcome = wanfast(*words, "--dry-run", "--json")
    assert outcome.exit_code == 0, outcome.err
    return outcome.document["plan"]


@pytest.mark.parametrize(
    ("model", "free", "num_gpus", "options"),
    [
        ("a14b", [84.0] * 8, 8, ["--num-gpus auto"]),
        ("a14b", [47.0] * 8, 8, ["--num-gpus auto", "--dit-fsdp on"]),
        ("a14b", [40.0] * 4, 4, ["--num-gpus auto", "--dit-fsdp on"]),
        ("a14b", [84.0] * 3, 2, ["--num-gpus 2"]),
        ("a14b", [84.0, 20.0], 1, []),
        ("a14b", [84.0], 1, []),
        ("a14b", [47.0], 1, ["--expert-offload on"]),
        ("tiny", [84.0] * 8, 4, ["--num-gpus 4"]),
    ],
    ids=["8x84", "8x47", "4x40", "3x84", "84 and a busy one", "84", "47", "two heads"],
)
def test_the_next_command_is_what_auto_would_choose(
    wanfast: Wanfast, workdir: Path, machine: Machine, model: str, free: list[float], num_gpus: int, options: list[str]
) -> None:
    machine(*free)
    pretend_weights(workdir / "artifacts")
    command = examine(wanfast, "--model", model)["next"]["command"]
    for option in ("--num-gpus auto", "--num-gpus 2", "--num-gpus 4", "--dit-fsdp on", "--expert-offload on"):
        assert (option in command) == (option in options), command
    assert ("--model tiny" in command) == (model == "tiny")
    plan = dry_run(wanfast, command)
    assert math.prod(plan["mesh"].values()) == plan["mesh"]["cfg"] * plan["mesh"]["ulysses"] == num_gpus
    auto = dry_run(wanfast, command, without=["--dit-fsdp", "--expert-offload"])
    for decided in ("dit_fsdp", "expert_offload", "mesh"):
        assert plan[decided] == auto[decided]


@pytest.mark.parametrize(
    ("free", "host", "arguments", "words", "option"),
    [
        ([40.0], 100, [], "it fits with --size 832x480:", "--size 832x480"),
        ([84.0], 100, ["--precision", "fp32", "--frames", "77"], "it fits with --precision bf16:", "--frames 77"),
        ([40.0], 100, ["--precision", "fp32"], "it fits with --precision bf16 --size 832x480:", "--size 832x480"),
        ([22.0], 100, [], "needs 1 GPU of 48 GB: experts offloaded, 43.6 GB a GPU and 63.7", "--model tiny"),
        ([47.0], 40, [], "63.7 GB of host memory", "--model tiny"),
        ([22.0], 100, ["--size", "8192x8192"], "fits on none of the known cards", "--model tiny"),
    ],
    ids=["40", "fp32", "40 and fp32", "22", "little host memory", "huge"],
)
def test_what_does_not_fit_is_said_with_what_would(
    wanfast: Wanfast,
    workdir: Path,
    machine: Machine,
    free: list[float],
    host: float,
    arguments: list[str],
    words: str,
    option: str,
) -> None:
    machine(*free, host_gb=host)
    pretend_weights(workdir / "artifacts")
    document = examine(wanfast, *arguments)
    assert not any(way["fits"]["here"] for way in document["fit"]["ways"])
    step = document["next"]
    assert words in step["why"]
    assert option in step["command"]
    assert "fp32" not in step["command"]
    dry_run(wanfast, step["command"])


@pytest.mark.usefixtures("_vae_of_23_gb")
def test_the_table_shows_the_sums_that_placement_decides_by(wanfast: Wanfast, machine: Machine) -> None:
    machine(47.0, host_gb=40)
    outcome = wanfast("doctor")
    assert (
        "29.0 one expert + 12.5 loop + 2.1 margin = 43.6, and 63.7 on the host: does not fit, 47.0 free" in outcome.out
    )
    assert "57.9 both experts + 23.0 VAE + 2.1 margin = 83.1: does not fit, 47.0 free" in outcome.out
    evicting = "57.9 both experts + 12.5 loop + 2.1 margin = 72.6, and {} on the host"
    assert f"{evicting.format(36.1)}: does not fit, 47.0 free" in outcome.out  # the report says what is missing
    machine(47.0, 47.0, 47.0, 47.0)
    outcome = wanfast("doctor")
    assert "14.5 share of both + 1.4 two blocks + 7.1 loop + 2.1 margin = 25.1: fits, 47.0 free" in outcome.out
    assert "43.6, and 127.4 on the host: does not fit, 47.0 free, and 100.0 on the host" in outcome.out  # for 2 ranks
    assert "H100, 47.0 GB of 47.0 GB free, capability 9.0, 18 NVLinks, driver 580.82" in outcome.out
    assert "8 GPUs" not in outcome.out
    machine()
    outcome = wanfast("doctor")
    assert f"{evicting.format('29.0')}: fits GPUs of 80 GB, 141 GB" in outcome.out
    assert "83.1: fits GPUs of 80 GB, 141 GB" in outcome.out
    assert "43.6, and 63.7 on the host: fits GPUs of 48 GB, 80 GB, 141 GB" in outcome.out


@pytest.mark.usefixtures("_vae_of_23_gb")
@pytest.mark.parametrize(
    ("scheme", "sum_", "mode"),
    [
        (None, "57.9 both experts + 23.0 VAE + 2.1 margin = 83.1: does not fit, 56.0 free", "offloaded"),
        ("bf16", "57.9 both experts + 23.0 VAE + 2.1 margin = 83.1: does not fit, 56.0 free", "offloaded"),
        ("int8-weight-only", "29.8 both experts + 23.0 VAE + 2.1 margin = 55.0: fits, 56.0 free", "resident"),
        ("int8-dynamic", "29.8 both experts + 23.0 VAE + 2.1 margin = 55.0: fits, 56.0 free", "resident"),
    ],
)
def test_quantized_experts_fit_smaller_cards(
    wanfast: Wanfast, workdir: Path, machine: Machine, scheme: Scheme | None, sum_: str, mode: str
) -> None:
    machine(56.0)
    pretend_weights(workdir / "artifacts")
    arguments = ["--quantize", scheme] if scheme else []
    assert sum_ in wanfast("doctor", *arguments).out
    if scheme:
        step = examine(wanfast, *arguments)["next"]
        assert step["command"] == f"wanfast quantize --model a14b --scheme {scheme}"
        assert f"the high-noise expert is not quantized with {scheme} yet" in step["why"]
        pretend_kept(workdir / "artifacts", scheme)
    step = examine(wanfast, *arguments)["next"]
    assert f"experts {mode}" in step["why"]
    assert (f"--quantize {scheme}" in step["command"]) == bool(scheme)
    plan = dry_run(wanfast, step["command"])
    assert (plan["quantize"], plan["expert_offload"]) == (scheme, "on" if mode == "offloaded" else "off")


def test_a_stored_expert_that_was_changed_is_named(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine(84.0)
    pretend_weights(workdir / "artifacts")
    pretend_kept(workdir / "artifacts", "bf16")
    for file in workdir.glob("artifacts/quantized/*/file"):
        file.unlink()
    step = examine(wanfast, "--quantize", "bf16")["next"]
    assert step["command"] == "wanfast quantize --model a14b --scheme bf16"
    assert "was changed after it was made: remove this folder, and run `wanfast quantize" in step["why"]


@pytest.mark.usefixtures("_vae_of_23_gb")
def test_quantized_experts_are_not_sharded(wanfast: Wanfast, machine: Machine) -> None:
    machine(47.0, 47.0)
    whole = {"resident", "offloaded"}
    for scheme, modes in (("bf16", {*whole, "sharded"}), ("fp8-rowwise", whole)):
        fit = examine(wanfast, "--quantize", scheme)["fit"]
        assert {way["mode"] for way in fit["ways"] if way["num_gpus"] == 2} == modes
        assert fit["quantize"] == scheme and scheme in fit["expert_bytes"]
    assert "14.9 in fp8-rowwise" in wanfast("doctor", "--quantize", "fp8-rowwise").out


def test_torchao_is_reported(
    wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(84.0)
    pretend_weights(workdir / "artifacts")
    for found, said in (
        ("0.18.0", "torchao  0.18.0"),
        (None, "torchao  not installed; `wanfast quantize` needs it"),
    ):
        there = {"torchao": found} if found else {}
        monkeypatch.setattr(
            packages, "versions", lambda there=there: dict.fromkeys(("wanfast", "python", "torch", "av"), "1") | there
        )
        monkeypatch.setattr(quantized, "torchao_version", lambda found=found: found)
        assert said in wanfast("doctor", "--quantize", "int8-dynamic").out
    step = examine(wanfast, "--quantize", "int8-dynamic")["next"]
    assert step["command"] == "pip install 'wanfast[quantize]'" and "which needs torchao" in step["why"]


def test_without_a_gpu_the_tiny_model_is_next_and_its_command_runs(wanfast: Wanfast, machine: Machine) -> None:
    machine()
    step = examine(wanfast)["next"]
    assert "needs 1 GPU of 48 GB" in step["why"]
    assert dry_run(wanfast, step["command"])["device"] == "cpu"


def test_a_torch_that_cannot_use_the_gpu_comes_first(
    wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(84.0, sees_gpu=False)
    assert examine(wanfast)["next"]["command"].startswith("pip install")
    monkeypatch.setitem(sys.modules, "torch", None)
    document = examine(wanfast)
    assert document["next"]["command"].startswith("pip install")
    assert "cannot be imported" in document["torch"]["trouble"]
    assert document["attention"]["kernels"] == {}


def test_missing_weights_are_said_with_the_fix(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine(84.0)
    assert examine(wanfast)["next"]["command"] == "wanfast download"
    step = examine(wanfast, "--artifacts-dir", "my kept")["next"]
    assert step["command"] == "wanfast download --artifacts-dir 'my kept'"
    assert "my kept/checkpoints/Wan2.2-I2V-A14B is missing" in step["why"]
    root = pretend_weights(workdir / "artifacts")
    assert examine(wanfast)["weights"] == {
        "model": "a14b",
        "folder": str(root),
        "layout": "original",
        "bytes": 0,
        "trouble": None,
    }
    (root / "low_noise_model/a.safetensors").unlink()
    document = examine(wanfast)
    assert "low_noise_model/*.safetensors is missing" in document["weights"]["trouble"]
    assert document["next"]["command"] == "wanfast download"
    document = examine(wanfast, "--model", "gone")
    assert "no such folder" in document["weights"]["trouble"]
    assert document["next"]["command"] == "wanfast doctor --model gone"


def test_whatever_download_fetches_is_to_be_downloaded(
    wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor knows no model's name."""
    machine(84.0)
    model = str(workdir / "b14b")
    monkeypatch.setitem(model_files.DOWNLOADED, model, 10**18)
    step = examine(wanfast, "--model", model)["next"]
    assert step["command"] == f"wanfast download --model {model}" and "GB free: free some" in step["why"]


def test_the_layout_of_which_a_part_is_there_is_the_one_to_fetch(
    wanfast: Wanfast, workdir: Path, machine: Machine
) -> None:
    machine(84.0)
    (workdir / "artifacts" / checkpoints("a14b", "diffusers") / "transformer").mkdir(parents=True)
    step = examine(wanfast)["next"]
    assert step["command"] == "wanfast download --layout diffusers"
    assert "run `wanfast download --layout diffusers` (126 GB)" in step["why"]


def test_a_full_disk_is_said_before_the_download(
    wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(84.0)
    for free, said in ((50e9, ["50.0 GB free"]), (200e9, [])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(300e9, 0, free))
        assert re.findall(r"[\d.]+ GB free", examine(wanfast)["next"]["why"]) == said


def test_only_what_is_missing_must_fit_on_the_disk(
    wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(84.0)
    root = pretend_weights(workdir / "artifacts")
    (root / "low_noise_model/a.safetensors").unlink()
    os.truncate(root / "high_noise_model/a.safetensors", 100 * 10**9)  # a sparse file, which takes no disk space
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(300e9, 250e9, 50e9))
    step = examine(wanfast)["next"]
    assert step["command"] == "wanfast download" and "GB free" not in step["why"]


def test_artifacts_are_listed_by_key_and_nothing_is_written(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine()
    before = sorted(workdir.rglob("*"))
    assert examine(wanfast)["artifacts"]["kinds"] == {}
    assert sorted(workdir.rglob("*")) == before
    for folder in ("prompt_embeds/0123456789ab/deep", "prompt_embeds/ba9876543210.partial", "runs"):
        (workdir / "artifacts" / folder).mkdir(parents=True)
    (workdir / "artifacts/prompt_embeds/0123456789ab/embeds.safetensors").write_bytes(b"x" * 1000)
    (workdir / "artifacts/prompt_embeds/0123456789ab/deep/file").write_bytes(b"x" * 24)
    (workdir / "artifacts/prompt_embeds/0123456789ab.lock").touch()
    before = sorted(workdir.rglob("*"))
    assert examine(wanfast)["artifacts"]["kinds"] == {
        "prompt_embeds": {"keys": ["0123456789ab"], "holds": {}, "bytes": 1024},
        "runs": {"keys": [], "holds": {}, "bytes": 0},
    }
    assert sorted(workdir.rglob("*")) == before


def test_each_kind_of_artifact_is_listed(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    """The kinds are those of artifacts/README.md."""
    machine()
    text = (ROOT / "artifacts/README.md").read_text()
    kinds = dict(re.findall(r"`(\w+)/([^`/]+)", text))
    assert len(kinds) > 10
    for kind, name in kinds.items():
        path = workdir / "artifacts" / kind / name.replace("<", "").replace(">", "")
        path.parent.mkdir(parents=True)
        if path.suffix == ".json":
            path.write_bytes(b"x" * 10)
        else:
            path.mkdir()
            (path / "file").write_bytes(b"x" * 10)
    found = examine(wanfast)["artifacts"]["kinds"]
    assert found.keys() == kinds.keys() and {len(each["keys"]) for each in found.values()} == {1}
    assert {each["bytes"] for each in found.values()} == {10} and found["hashes"]["keys"] == ["key"]


def test_artifacts_say_what_they_hold(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine()
    inputs = {
        "quantized": {"expert": "high_noise", "recipe": "fp8-rowwise"},
        "inductor": {"tokens": 32, "quantize": None, "precision": "bf16", "mode": "default", "device": "NVIDIA H200"},
    }
    for kind, known in inputs.items():
        folder = workdir / "artifacts" / kind / "0123456789ab"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"inputs": known}))
    (workdir / "artifacts/quantized/ba9876543210").mkdir()
    (workdir / "artifacts/quantized/ba9876543210/manifest.json").write_text("{")  # listed, not judged
    out = wanfast("doctor", "--model", "tiny").out
    assert "0123456789ab (high_noise with fp8-rowwise), ba9876543210" in out
    assert "0123456789ab (32 tokens, bf16, default, for NVIDIA H200)" in out


def test_one_document_ends_stdout_and_the_rest_is_for_people(wanfast: Wanfast, machine: Machine) -> None:
    machine()
    outcome = wanfast("doctor", "--model", "tiny", "--json")
    (line,) = outcome.out.splitlines()
    assert set(json.loads(line)) == {
        "gpus", "host", "torch", "attention", "encoder", "weights", "artifacts", "fit", "next", "versions",
    }  # fmt: skip
    assert json.loads(line)["encoder"]["libx264"] is True
    plain = wanfast("doctor", "--model", "tiny")
    assert plain.err == ""
    headings = [line for line in plain.out.splitlines() if not line.startswith(" ")]
    for heading, start in zip(
        headings, ("machine", "software", "attention on cpu", "files", "next: nothing is missing"), strict=True
    ):
        assert heading.startswith(start)
        assert heading in outcome.err
    assert plain.out.splitlines()[-1].strip() == json.loads(line)["next"]["command"]
    assert "fa3, fa4, fa2  only on a GPU" in plain.out and "fa3-fwd" not in plain.out
    out = wanfast("doctor").out
    assert "resident: both experts stay on the GPU; evicting: " in out
    assert "the driver reports 85.0 GB for a card of 80 GB" in out
    machine(84.0)
    assert "the driver reports" not in wanfast("doctor").out  # this machine's own bytes are shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "bad"],
        ["--frames", "80"],
        ["--model", ""],
        ["--precision", "fp8"],
        ["--size", "0x16"],
        ["--quantize", "bf16", "--precision", "fp32"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused(wanfast: Wanfast, machine: Machine, arguments: list[str]) -> None:
    machine()
    outcome = wanfast("doctor", *arguments)
    assert outcome.exit_code == 2
    assert outcome.out == ""
    assert arguments[0] in outcome.err


def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
    weights = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()).mul(options["softmax_scale"]).softmax(-1)
    return (torch.einsum("bhlm,bmhd->blhd", weights, v.float()).bfloat16(),)


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
    return right(q, k, v, softmax_scale=1.0)


def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
    return (right(q, k, v, **options)[0].transpose(1, 2),)


def not_a_number(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
    return (right(q, k, v, **options)[0] * math.nan,)


def no_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (right, "runs"),
        (unscaled, "fails: the kernel's result is wrong: relative error"),
        (not_a_number, "fails: the kernel's result is wrong: relative error nan"),
        (heads_first, "fails: the kernel's result has the shape [1, 2, 256, 128], not [1, 256, 2, 128]"),
        (no_kernel, "fails: no kernel image is available"),
        (lambda q: q, "fails: "),
        (None, "fails: cannot import name"),
    ],
    ids=["right", "unscaled", "nan", "heads first", "no kernel", "another version", "without the function"],
)
def test_a_kernel_runs_only_if_its_numbers_are_right(
    wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any] | None, said: str
) -> None:
    machine()
    module = ModuleType("fa3_fwd_interface")
    module.__spec__ = ModuleSpec("fa3_fwd_interface", None)
    if kernel is not None:
        module._flash_attn_forward = kernel
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    (line,) = (line for line in wanfast("doctor", "--model", "tiny").out.splitlines() if line.startswith("  fa3 "))
    assert line.removeprefix("  fa3").strip().startswith(said)


def test_an_installed_kernel_without_code_for_a_cpu_does_not_fail(
    wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch then raises an error with more than a thousand letters."""
    machine()

    def for_gpus(*tensors: torch.Tensor, **options: Any) -> None:
        raise NotImplementedError("Could not run 'fa3_fwd::fwd' with arguments from the 'CPU' backend. This could be")

    module = ModuleType("fa3_fwd_interface")
    module.__spec__, module._flash_attn_forward = ModuleSpec("fa3_fwd_interface", None), for_gpus
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    assert "  fa3, fa4, fa2  only on a GPU" in wanfast("doctor", "--model", "tiny").out


def test_packages_that_share_a_folder_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 makes `flash_attn` importable, also if FlashAttention-2 is not installed."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = attention_probe.probe_all("cpu")
    assert (found["fa2"].state, found["fa2"].reason) == ("not installed", "pip install 'wanfast[fa2]'")
    assert found["fa4"].state == "fails"
    assert found["fa3"].state == "not installed"
    assert found["math"].state == "runs" and "cudnn" not in found
    sys.modules.pop("flash_attn", None)
