"""Tests the same program on a GPU (`make test-gpu`); skipped without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Outcome
from tests.engine.test_session import job_of, make
from tests.parity import likeness, relative_error
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.engine.finite import FiniteWatch
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.errors import NotFiniteError
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store import model_files
from wanfast.runtime.weights import builders
from wanfast.runtime.weights.builders import build_expert, build_umt5, build_vae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Wanfast = Callable[..., Outcome]
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--device", "cuda")


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@torch.inference_mode()
def outputs(device: str, precision: builders.Precision) -> dict[str, torch.Tensor]:
    """Returns the outputs of each network of the tiny model, on fixed inputs."""
    files = model_files.locate("tiny", "artifacts")
    generator = torch.Generator().manual_seed(0)
    latent, condition = (torch.randn(1, c, 5, 16, 16, generator=generator) for c in (16, 20))
    ids = torch.randint(3, 900, (1, 9), generator=generator)
    video = torch.randn(1, 3, 9, 64, 64, generator=generator).clamp(-1, 1)
    text = build_umt5(files, "fp32", Ranks(device))(ids.to(device))
    expert = build_expert(files, "high_noise", precision, Ranks(device))
    rope = rotary_tables((5, 8, 8), files.spec.dit.head_dim, device)
    timestep = torch.tensor([950], device=device)
    velocity, _ = expert(latent.to(device), condition.to(device), timestep, expert.encode_text(text), rope)
    vae = build_vae(files, device)
    encoded = vae.encode(video.to(device))
    found = {"DiT": velocity, "encode": encoded, "decode": vae.decode(encoded)}
    found["UMT5"] = text if precision == "fp32" else build_umt5(files, precision, Ranks(device))(ids.to(device))
    return {name: tensor.float().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_models_equal_the_cpus(precision: builders.Precision) -> None:
    """fp32 meets a tight bound; in bf16 the GPU's rounding error is at most 1.5 times the CPU's."""
    exact, got, rounded = outputs("cpu", "fp32"), outputs("cuda", precision), outputs("cpu", precision)
    for name in exact:
        error, of_cpu = relative_error(got[name], exact[name]), relative_error(rounded[name], exact[name])
        print(
            f"{name} {precision} on {torch.cuda.get_device_name()}: relative error {error:.1e}, of the CPU {of_cpu:.1e}"
        )
        assert error <= max(2e-5, 1.5 * of_cpu)  # float32 alone gives 1.2e-5 (H200)


@pytest.mark.parametrize("noise_device", ["cpu", "cuda"])
def test_a_video_can_be_made_again_bit_for_bit(wanfast: Wanfast, workdir: Path, noise_device: str) -> None:
    outcome = wanfast(*GOOD, "--noise-device", noise_device)
    assert outcome.exit_code == 0, outcome.err
    assert wanfast("generate", "--from", "out.json", "--output", "again.mp4").exit_code == 0
    assert (workdir / "again.mp4").read_bytes() == (workdir / "out.mp4").read_bytes()
    document = json.loads((workdir / "out.json").read_text())
    assert document["hardware"]["device"] == torch.cuda.get_device_name()
    steps, denoise = document["step_s"], document["seconds"]["denoise"]
    assert min(steps) > 0 and 0.5 * denoise < sum(steps) <= denoise + 0.001 * len(steps)
    print({name: document[name] for name in ("seconds", "peak_memory_bytes", "hardware")})


def test_noise_of_the_two_devices_differs(wanfast: Wanfast, workdir: Path) -> None:
    for noise_device in ("cpu", "cuda"):
        assert wanfast(*GOOD, "--noise-device", noise_device, "--output", f"{noise_device}.mp4").exit_code == 0
    assert (workdir / "cpu.mp4").read_bytes() != (workdir / "cuda.mp4").read_bytes()


def test_experts_are_evicted_for_a_decoder_that_does_not_fit(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts come back for the next video."""
    decode, failures, moved = WanVAE.decode_stream, iter(range(1)), []

    def failing(*arguments: object) -> Iterator[torch.Tensor]:
        if next(failures, None) is not None:
            raise torch.OutOfMemoryError("a decoder is large")
        moved.append(torch.cuda.memory_allocated())
        yield from decode(*arguments)

    monkeypatch.setattr(WanVAE, "decode_stream", failing)
    first, second = make([job_of(device="cuda")] * 2, Sessions(Ranks("cuda")))
    assert moved[0] < moved[1]  # without the experts, then with them
    assert (np.load(first["frames"]) == np.load(second["frames"])).all()


def test_cuda_graphs_make_what_the_blocks_do() -> None:
    """The graphs serve both experts in turn, with new inputs in each forward, and weights that moved."""
    files, ranks = model_files.locate("tiny", "artifacts"), Ranks("cuda")
    plain, graphed = ([build_expert(files, expert, "bf16", ranks) for expert in EXPERTS] for _ in range(2))
    for model in graphed:
        compile_blocks(model, "max-autotune")
    rope = rotary_tables((5, 8, 8), files.spec.dit.head_dim, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    torch._dynamo.utils.counters.clear()
    for forward in range(8):
        which = forward // 4
        latent, condition = (torch.randn(1, c, 5, 16, 16, generator=generator, device="cuda") for c in (16, 20))
        text = torch.randn(1, 9, files.spec.dit.text_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        timestep = torch.tensor([900 - 100 * forward], device="cuda")
        if forward == 6:  # moves the weights, like after an eviction
            addresses = [parameter.data_ptr() for parameter in graphed[which].parameters()]
            graphed[which].to("cpu")
            held = [torch.empty_like(parameter, device="cuda") for parameter in graphed[which].parameters()]
            graphed[which].to("cuda")
            assert addresses != [parameter.data_ptr() for parameter in graphed[which].parameters()]
            del held
        with torch.inference_mode():
            (expected, kept), (got, own) = (
                model[which](latent, condition, timestep, model[which].encode_text(text), rope, keep_residual=True)
                for model in (plain, graphed)
            )
        assert kept is not None and own is not None
        assert relative_error(got, expected) <= 1e-2 and relative_error(own, kept) <= 1e-2
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_manager(0, create_if_none_exists=False)
    assert manager is not None and sum(map(len, manager.roots.values())) == 3  # two experts, and one that moved


def test_a_video_by_cuda_graphs(wanfast: Wanfast, workdir: Path) -> None:
    """The second of two videos, in which every forward is replayed, equals the first bit for bit."""
    (workdir / "jobs.jsonl").write_text('{"output": "a.mp4"}\n{"output": "b.mp4"}\n')
    outcome = wanfast(*GOOD, "--compile", "--compile-mode", "max-autotune", "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 0, outcome.err
    assert (workdir / "a.mp4").read_bytes() == (workdir / "b.mp4").read_bytes()
    assert wanfast(*GOOD).exit_code == 0
    found = likeness("b.mp4", "out.mp4")
    print(found, json.loads((workdir / "b.json").read_text())["seconds"])
    assert found >= 35  # rounding in bf16


def test_looking_for_nan_never_waits_for_the_queue() -> None:
    torch.empty(1, pin_memory=True)  # the first pinned block waits
    latent, watch = torch.randn(1, 16, 5, 30, 52, device="cuda"), FiniteWatch(Ranks("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            watch.look(f"step {step}", latent)
        watch.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    latent[0, 3, 2, 1, 0] = torch.nan
    watch.look("the spoilt one", latent)
    with pytest.raises(NotFiniteError, match="the spoilt one"):
        watch.look("the next", torch.ones(1, device="cuda"))
