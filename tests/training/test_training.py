"""Tests training in pieces: an interrupted and resumed run equals, bit for bit, an uninterrupted run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import training.__main__ as training_main
import training.loop
from training import train_experts, train_vae
from training.export import export
from training.loop import Schedule, load_ema, train
from training.spec import SPEC
from wanfast.quality.world import Renderer
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts.model_spec import DiTSpec, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_expert, build_umt5, build_vae

SMALL = ModelSpec(
    dit=DiTSpec(dim=48, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16, text_dim=16, text_len=64),
    vae=VAESpec(base_dim=4),
    umt5=UMT5Spec(vocab_size=960, dim=16, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=1),
)


def final(folder: Path, name: str) -> dict[str, object]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def experts() -> tuple[train_experts.TinyModel, train_experts.Clips]:
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(6, c, 2, 4, 4, generator=generator).bfloat16() for c in (16, 20))
    clips = train_experts.Clips(z, y, torch.randint(3, 900, (7, 5), generator=generator), torch.tensor([5] * 6 + [1]))
    return train_experts.TinyModel(SMALL), clips


def fit_experts(schedule: Schedule, folder: Path) -> bool:
    model, clips = experts()
    draw = train_experts.noised(SMALL, clips, 2)
    return train("experts", model, draw, train_experts.flow_loss(model, clips.z), schedule, folder)


@pytest.mark.parametrize("stage", ["vae", "decoder", "experts"])
def test_resumed_training_is_the_same_training(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, deadline: float = math.inf) -> bool:
        schedule = Schedule(steps=4, learning_rate=1e-3, warmup=2, log_every=1, deadline=deadline)
        if stage == "decoder":
            initial(folder)
            return train_vae.fit_decoder(SMALL.vae, schedule, folder, "cpu", batch=1, side=16)
        if stage == "vae":
            vae = train_vae.build(SMALL.vae, "cpu")
            draw = train_vae.windows(SMALL.vae, Renderer("cpu"), 1, 16, 5)
            return train("vae", vae, draw, train_vae.vae_loss(vae), schedule, folder)
        return fit_experts(schedule, folder)

    assert run(tmp_path / "whole")
    clock = iter([0.0] * 8 + [1e9] * 20)  # the time is over after some steps
    monkeypatch.setattr(training.loop, "monotonic", lambda: next(clock))
    assert not run(tmp_path / "pieces", deadline=480)
    monkeypatch.undo()
    assert 0 < final(tmp_path / "pieces", stage)["step"] < 4
    with (tmp_path / "pieces" / f"{stage}.jsonl").open("a") as log:
        log.write('{"step": 3}\n')  # a killed run leaves this line: logged, not saved
    assert run(tmp_path / "pieces")
    lines = (tmp_path / "pieces" / f"{stage}.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert equal(final(tmp_path / "pieces", stage), final(tmp_path / "whole", stage))
    file = tmp_path / "whole" / f"{stage}.pt"
    written = file.stat().st_mtime_ns
    assert run(tmp_path / "whole") and file.stat().st_mtime_ns == written  # finished steps are not repeated


def initial(folder: Path) -> None:
    """Writes a VAE from which stage 2 can start."""
    folder.mkdir(exist_ok=True)
    torch.save({"ema": [p.detach() for p in train_vae.build(SMALL.vae, "cpu").parameters()]}, folder / "vae.pt")


def test_the_decoder_is_trained_alone_and_exported(tmp_path: Path) -> None:
    initial(tmp_path)
    before = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    schedule = Schedule(steps=2, learning_rate=1e-2, warmup=1)
    assert train_vae.fit_decoder(SMALL.vae, schedule, tmp_path, "cpu", batch=1, side=16)
    after = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}  # the latents are unchanged


@pytest.mark.slow
def test_all_stages_run_and_a_stage_waits_for_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_main, "make_deterministic", lambda: None)  # it would affect the whole suite
    monkeypatch.setattr(training_main, "SPEC", SMALL)

    def call(*arguments: str) -> str | int | None:
        monkeypatch.setattr("sys.argv", ["training", "--folder", str(tmp_path), "--smoke", *arguments])
        try:
            return training_main.main()
        except SystemExit as stop:
            return stop.code

    assert "needs the finished --stage vae" in str(call("--stage", "experts"))
    assert "--stage vae is not finished" in str(call("--minutes", "0"))
    assert call() is None
    assert model_files.locate(str(tmp_path / "tiny"), "artifacts").exists


def test_losses_fall(tmp_path: Path) -> None:
    model, clips = experts()
    draw, loss = train_experts.noised(SMALL, clips, 4), train_experts.flow_loss(model, clips.z)

    def measured() -> float:
        return float(loss(*draw(0, torch.Generator().manual_seed(9)))["loss"].detach())

    before = measured()
    train("experts", model, draw, loss, Schedule(steps=30, learning_rate=3e-3, warmup=3), tmp_path)
    after = measured()
    assert after < 0.9 * before


def test_what_is_exported_is_what_was_trained(tmp_path: Path) -> None:
    assert fit_experts(Schedule(steps=2, learning_rate=1e-3), tmp_path)
    model, _ = experts()
    load_ema(model, tmp_path / "experts.pt")
    vae = train_vae.build(SMALL.vae, "cpu")
    export(SMALL, model, vae, tmp_path / "tiny")
    files = model_files.locate(str(tmp_path / "tiny"), "artifacts")
    assert files.spec == SMALL
    for built, trained in (
        (build_expert(files, "high_noise", "fp32", Ranks("cpu")), model.high_noise),
        (build_expert(files, "low_noise", "fp32", Ranks("cpu")), model.low_noise),
        (build_umt5(files, "fp32", Ranks("cpu")), model.umt5),
        (build_vae(files, "cpu"), vae),
    ):
        for name, value in trained.state_dict().items():
            assert torch.equal(built.state_dict()[name], value.bfloat16().float()), name


def test_the_tiny_model_has_the_kernels_shapes_of_the_real_one() -> None:
    assert SPEC.dit.head_dim == 128
    assert SPEC.dit.in_channels == SPEC.dit.out_channels + 20
