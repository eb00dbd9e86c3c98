"""Tests training in pieces: an interrupted and resumed run equals, bit for bit, an uninterrupted run."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import training.__main__ as training_main
import training.loop
from tests.small_pack import write_pack
from training import plot, train_experts, train_lora, train_vae
from training.clips import FOR_VAE, LARGE, Mix
from training.clips import SMALL as SMALL_CLIPS
from training.export import export
from training.loop import Schedule, load_ema, train
from training.muon import Muon
from training.spec import SPEC
from wanfast.quality.world import Scene
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.conditioning import given_clip
from wanfast.runtime.engine.denoise import denoise
from wanfast.runtime.facts.choices import EXPERTS, Branch, Expert
from wanfast.runtime.facts.model_spec import DiTSpec, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.sampling.guidance import Guidance, guided_steps
from wanfast.runtime.sampling.scheduler import grid, solve
from wanfast.runtime.store import model_files
from wanfast.runtime.store.loras import Lora
from wanfast.runtime.weights.builders import build_expert, build_umt5, build_vae
from wanfast.runtime.weights.lora import merge_of

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


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    return Mix(write_pack(tmp_path_factory.mktemp("pack") / "photographs.zip"), "cpu")


def experts() -> tuple[train_experts.TinyModel, list[train_experts.Clips]]:
    """Returns the model and two sets of random clips, of two shapes."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for width in (4, 6):
        z, y = (torch.randn(6, c, 2, 4, width, generator=generator).bfloat16() for c in (16, 20))
        ids = torch.randint(3, 900, (7, 5), generator=generator)
        sets.append(train_experts.Clips(z, y, ids, torch.tensor([5] * 6 + [1])))
    return train_experts.TinyModel(SMALL), sets


def fit_experts(schedule: Schedule, folder: Path) -> bool:
    return train_experts.fit(SMALL, experts()[1], schedule, folder, "cpu", (2, 1), (0, 1, 1))


def test_muon_shrinks_matrices_by_the_rate_and_the_decay() -> None:
    matrix = torch.nn.Parameter(torch.eye(4) * 3)
    matrix.grad = torch.zeros(4, 4)
    muon = Muon([matrix], weight_decay=0.5)
    muon.rate.fill_(0.1)
    muon.step()
    assert torch.allclose(matrix, torch.eye(4) * 3 * (1 - 0.1 * 0.5))


def test_wrong_gradients_end_a_stage_and_name_the_step(tmp_path: Path) -> None:
    def loss(x: Tensor) -> dict[str, Tensor]:
        return {"loss": (layer(x) * 1e6).square().mean()}

    layer = torch.nn.Linear(2, 2)
    schedule = Schedule(steps=3, muon_rate=0.1)
    with pytest.raises(RuntimeError, match=r"pieces: the gradients' norm is .* at step 0"):
        train("pieces", layer, lambda step, generator: (torch.ones(1, 2),), loss, schedule, tmp_path)


def test_gradients_that_differ_from_those_without_a_graph_end_a_stage() -> None:
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]

    training.loop.require_as_eager(gradients, lambda: gradients[1].fill_(3.1))
    assert gradients[1].item() == 3.0  # as before the comparison
    with pytest.raises(RuntimeError, match="the gradients differ by 99% from"):
        training.loop.require_as_eager(gradients, lambda: gradients[1].fill_(300.0))


def test_the_experts_of_a_model_are_trained_further(tmp_path: Path) -> None:
    """Before the first step, the networks are those of the model, and they are not frozen."""
    tiny = model_files.locate("tiny", "artifacts")
    assert train_experts.fit(
        tiny.spec, experts()[1], Schedule(steps=0, muon_rate=1e-3), tmp_path, "cpu", (2, 1), (0, 1), start=tiny
    )
    start = train_experts.trained(tiny)
    assert equal(dict(final(tmp_path, "experts")["network"]), dict(start.state_dict()))
    assert len(final(tmp_path, "experts")["optimizers"][0]["state"]) > 20


@pytest.mark.parametrize("alone", EXPERTS)
def test_an_expert_that_learns_alone_learns_as_with_the_other_one(tmp_path: Path, alone: Expert) -> None:
    start, sets = train_experts.trained(model_files.locate("tiny", "artifacts")), experts()[1]
    batch = train_experts.noised(SMALL, sets, (4, 4), (0, 1))(0, torch.Generator().manual_seed(0))
    term = alone.removesuffix("_noise")
    both, one = (train_experts.flow_loss(start, names)(*batch) for names in (EXPERTS, (alone,)))
    assert one.keys() == {"loss", term}
    assert torch.allclose(one["loss"], both[term], rtol=1e-6)

    schedule = Schedule(steps=2, muon_rate=1e-3, warmup=1)
    files = model_files.locate("tiny", "artifacts")
    assert train_experts.fit(files.spec, sets, schedule, tmp_path, "cpu", (2, 1), (0, 1), start=files, learning=alone)
    learned = final(tmp_path, f"experts-{alone}")["network"]
    changed = {name.split(".")[0] for name, value in start.state_dict().items() if not equal(learned[name], value)}
    assert changed == {alone}


def test_experts_that_learn_on_get_clips_of_their_own_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(training_main, "stored", lambda names, *_: asked.append(names))
    monkeypatch.setattr(train_vae, "load", lambda *_: SimpleNamespace())
    monkeypatch.setattr(training_main, "Mix", lambda *_: None)
    (tmp_path / train_vae.FINISHED).write_bytes(b"vae")
    for start in (None, "tiny"):
        options = Namespace(folder=tmp_path, device="cpu", photographs=tmp_path, start=start, encode=None)
        training_main.encoded_sets(SPEC, train_experts.TOY, options)
    assert len({*asked[0], *asked[1]}) == 4


def test_experts_learn_on_with_the_vae_of_their_model(tmp_path: Path) -> None:
    tiny = model_files.locate("tiny", "artifacts")
    train_vae.take(tiny, tmp_path / "new")
    assert train_vae.finished(SPEC.vae, tmp_path / "new") == tiny.spec.vae
    taken = train_vae.load(SPEC.vae, tmp_path / "new", "cpu").state_dict()
    assert equal(dict(taken), dict(build_vae(tiny, "cpu").state_dict()))


@pytest.mark.parametrize("stage", ["vae-short", "vae-long", "experts", "experts-high_noise", "lora"])
def test_resumed_training_is_the_same_training(
    tmp_path: Path, stage: str, mix: Mix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, deadline: float = math.inf) -> bool:
        schedule = Schedule(steps=4, muon_rate=1e-3, warmup=2, log_every=1, deadline=deadline)
        if stage == "vae-long":
            initial(folder)
        if stage == "lora":
            return train_lora.fit(teacher(), [teacher_paths()], schedule, folder, [2])
        if stage == "experts-high_noise":
            model, sets = experts()
            export(SMALL, model, train_vae.build(SMALL.vae, "cpu"), tmp_path / "start")
            start = model_files.locate(str(tmp_path / "start"), "artifacts")
            return train_experts.fit(
                SMALL, sets, schedule, folder, "cpu", (2, 1), (0, 1), start=start, learning="high_noise"
            )
        if stage != "experts":
            return train_vae.fit(SMALL.vae, pools(mix), schedule, folder, train_vae.TOY, stage)
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


def teacher() -> train_experts.TinyModel:
    """Returns a model whose heads are not zero, as after training."""
    model = experts()[0].requires_grad_(False)
    for name in EXPERTS:
        head = train_experts.expert_of(model, name).head.head.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    return model


@cache
def teacher_paths() -> train_lora.Paths:
    return train_lora.paths(teacher(), experts()[1][0], 4, 0)


def pools(mix: Mix) -> list[Tensor]:
    return [train_vae.render(mix, kind, 0) for kind in train_vae.TOY]


def whole(window: Tensor, mirrored: int) -> Tensor:
    """Returns a window as a batch holds it."""
    video = window.float() / 127.5 - 1
    return video.flip(-1) if mirrored else video


def initial(folder: Path) -> None:
    """Writes a VAE from which the long windows can start."""
    folder.mkdir(exist_ok=True)
    weights = [p.detach() + 0.01 for p in train_vae.build(SMALL.vae, "cpu").parameters()]
    torch.save({"ema": weights}, folder / "vae-short.pt")


def test_long_windows_continue_from_short_ones_and_only_the_end_moves_on(tmp_path: Path, mix: Mix) -> None:
    initial(tmp_path)
    before = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    schedule = Schedule(steps=2, muon_rate=1e-9, adam_rate=0.0, warmup=1)
    assert train_vae.fit(SMALL.vae, pools(mix), schedule, tmp_path, train_vae.TOY, "vae-long")
    after = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)  # not from the start
    assert any(not torch.equal(before[name], after[name]) for name in before)
    train_vae.finish(SMALL.vae, mix, tmp_path, clips=1)
    for name in ("vae-short", "vae-long"):
        (tmp_path / f"{name}.pt").unlink()  # only the finished weights move to the next stage
    moved = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    assert all(torch.equal(moved[name], after[name].bfloat16().float()) for name in after)
    assert len(set(train_vae.finished(SMALL.vae, tmp_path).latents_std)) > 1


def test_the_decoder_learns_again_and_latents_stay(tmp_path: Path, mix: Mix) -> None:
    """Also through a checkpoint, because a stage may be interrupted."""
    weights = [p.detach().bfloat16() for p in train_vae.build(SMALL.vae, "cpu").parameters()]
    facts = {"latents_mean": [0.25] * 16, "latents_std": [2.0] * 16}
    torch.save({"ema": weights, **facts}, tmp_path / "vae-finished.pt")
    before = {name: value.clone() for name, value in train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict().items()}
    for steps in (1, 2):
        schedule = Schedule(steps=steps, muon_rate=0.1, weight_decay=0.1, warmup=1)
        assert train_vae.fit(SMALL.vae, pools(mix), schedule, tmp_path, train_vae.TOY, "vae-decoder")
    train_vae.finish_decoder(tmp_path)
    after = train_vae.load(SMALL.vae, tmp_path, "cpu").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert {"decoder.conv_in.weight", "post_quant_conv.weight"} <= changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    spec = train_vae.finished(SMALL.vae, tmp_path)
    assert (spec.latents_mean, spec.latents_std) == ((0.25,) * 16, (2.0,) * 16)


@pytest.mark.parametrize("learning", [True, False])
def test_a_whole_clip_at_once_is_the_pipelines_clip(learning: bool) -> None:
    vae = train_vae.build(SMALL.vae, "cpu")
    vae.spec = replace(SMALL.vae, latents_mean=(0.2,) * 16, latents_std=(1.5,) * 16)
    video = torch.rand(2, 3, 13, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video)
        decoded = vae.decode(latents)
    with torch.set_grad_enabled(learning):
        assert torch.allclose(train_vae.encode(vae, video), latents, atol=1e-4)
        assert torch.allclose(train_vae.decode(vae, latents), decoded, atol=1e-4)


def kinds_of(scenes: list[Scene]) -> tuple[int, int]:
    """Returns how many scenes are photographs alone, and how many are shapes over photographs."""
    alone = sum(scene.subject is None for scene in scenes)
    return alone, sum(scene.subject is not None and scene.shot is not None for scene in scenes)


def test_batches_take_the_formats_in_turn_and_show_each_kind_of_clip(mix: Mix) -> None:
    rendered = pools(mix)
    assert [tuple(pool.shape) for pool in rendered] == [(3, 3, 5, 16, 16), (3, 3, 5, 32, 32)]
    draw = train_vae.windows(SMALL.vae, rendered, train_vae.TOY)
    shapes = [draw(step, torch.Generator().manual_seed(step))[0].shape for step in range(3)]
    assert shapes == [(1, 3, 5, 16, 16), (1, 3, 5, 32, 32), (1, 3, 5, 16, 16)]
    seen = set()
    for step in range(0, 160, 2):
        video = draw(step, torch.Generator().manual_seed(step))[0][0]
        alike = [(k, side) for k in range(3) for side in (0, 1) if torch.equal(video, whole(rendered[0][k], side))]
        assert len(alike) == 1
        seen.add(alike[0])
    assert len(seen) == 6  # each window, as it is and mirrored
    scenes = [mix.scene(number, (128, 128)) for number in range(200)]
    alone, over = kinds_of(scenes)
    assert 35 < alone < 70 and 20 < over < 60  # of 200: a quarter and a fifth
    of_vae = copy(mix)
    of_vae.shares = FOR_VAE
    alone, over = kinds_of([of_vae.scene(number, (128, 128)) for number in range(200)])
    assert 75 < alone < 125 and 40 < over < 80  # of 200: a half and three tenths
    motions = [scene.motion for scene in scenes if scene.subject is not None]
    spin, shrink = (motions.count(name) / len(motions) for name in ("spin", "shrink"))
    assert 0.28 < spin < 0.5 and 0.12 < shrink < 0.25  # by chance 0.07 and 0.08
    cameras = [str(scene.camera).split()[0] for scene in scenes if scene.subject is None]
    assert 0.6 < sum(name in ("zoom", "turn") for name in cameras) / len(cameras) < 0.85  # by chance 0.44
    assert [form.size for form in SMALL_CLIPS] == [(128, 128), (144, 96), (96, 144)]
    assert [form.size for form in LARGE] == [(256, 256), (288, 208), (208, 288)]
    square = LARGE[0]
    assert (square.frames + 3) // 4 * square.size[0] * square.size[1] // 256 == 18 * 128  # tokens


def test_a_third_of_the_clips_has_a_last_frame(mix: Mix) -> None:
    vae = train_vae.build(SMALL.vae, "cpu").eval()
    kind = train_experts.Kind(train_vae.Format((32, 16), 9), clips=5, batch=3)
    clips = train_experts.encode_clips(vae, mix, kind, 0)
    assert clips.z.shape == (5, 16, 3, 2, 4) and clips.y.shape == (5, 20, 3, 2, 4)
    assert clips.ids.shape == (6, 40) and len(clips.lengths) == 6
    given = clips.y[:, 3, -1].float().mean(dim=(1, 2)).tolist()  # the last mask channel of the last latent frame
    assert given == [1, 0, 0, 1, 0]
    assert not clips.y[:, :3, -1].any() and clips.y[:, :4, 0].all() and not clips.y[:, :4, 1].any()
    with torch.no_grad():  # the latents are of the pipeline's clips
        video = torch.rand(2, 3, 9, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        conditions = train_experts.conditions_of(vae, video, 1)
        for row, given in ((0, [0, -1]), (1, [0])):
            expected = train_vae.encode(vae, given_clip(video[row, :, given].movedim(1, 0), 9))
            assert torch.allclose(conditions[row, 4:], expected[0], atol=1e-5)


@pytest.mark.slow
def test_all_stages_run_and_a_stage_waits_for_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_main, "prepare_torch", lambda: None)  # it would affect the whole suite
    monkeypatch.setattr(training_main, "SPEC", SMALL)
    pack = write_pack(tmp_path / "photographs.zip")

    def call(*arguments: str) -> str | int | None:
        options = ["--folder", str(tmp_path), "--photographs", str(pack), "--smoke", *arguments]
        monkeypatch.setattr("sys.argv", ["training", *options])
        try:
            return training_main.main()
        except SystemExit as stop:
            return stop.code

    assert "needs the finished --stage vae-short" in str(call("--stage", "experts"))
    for stages in ((), ("--stage", "vae-long", "vae-short")):
        assert call("--minutes", "0", *stages) == 75
        assert "--stage vae-short is not finished" in capsys.readouterr().err
    assert call() is None
    for file in tmp_path.glob("clips-*.pt"):
        file.unlink()
    os.utime(tmp_path / "vae-finished.pt", (1, 1))  # as if the decoder's last step was the end of a process
    assert call() is None
    assert (tmp_path / "vae-finished.pt").stat().st_mtime > 1
    assert not list(tmp_path.glob("clips-*.pt"))  # the experts are trained: nothing is encoded again
    for name in ("vae-short.pt", "vae-long.pt"):
        (tmp_path / name).unlink()
    assert call("--stage", "export") is None  # needs only what moves between machines, and the experts
    assert model_files.locate(str(tmp_path / "tiny"), "artifacts").exists
    assert {file.stem for file in (tmp_path / "tiny/loras/lightning-4").iterdir()} == {"high_noise", "low_noise"}

    further = ("--stage", "experts", "--start", str(tmp_path / "tiny"))
    assert call("--stage", "experts", "--learning", "high_noise") == 2  # new experts learn together
    assert call(*further, "--encode", "1") is None
    (encoded,) = tmp_path.glob("clips-*.pt")
    assert 21_000_000 <= int(encoded.name.split("-")[1]) < 25_000_000
    paths = [file.unlink() or file.name for file in sorted(tmp_path.glob("lora-paths-*.pt"))]
    assert call("--stage", "lora", "--encode", "1") is None
    assert [file.name for file in tmp_path.glob("lora-paths-*.pt")] == [paths[1]] == ["lora-paths-1.pt"]
    for alone in EXPERTS:
        before = {name: build_expert(files_of(tmp_path), name, "fp32", Ranks("cpu")).state_dict() for name in EXPERTS}
        assert call(*further, "--learning", alone) is None
        assert call("--stage", "export") is None
        after = {name: build_expert(files_of(tmp_path), name, "fp32", Ranks("cpu")).state_dict() for name in EXPERTS}
        assert {name for name in EXPERTS if not equal(dict(before[name]), dict(after[name]))} == {alone}
    other = final(tmp_path, "experts-low_noise")
    other["ema"][-1].add_(1)  # type: ignore[index]  # of UMT5, the last network
    torch.save(other, tmp_path / "experts-low_noise.pt")
    assert "the experts learned with different text encoders" in str(call("--stage", "export"))


def files_of(folder: Path) -> model_files.ModelFiles:
    return model_files.locate(str(folder / "tiny"), "artifacts")


def test_all_graphs_write_the_gradients_that_the_optimizers_read() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    gradients = training.loop._gradients([parameter], lambda x: {"loss": (parameter * x).sum()})
    gradient = parameter.grad
    for value in (0.1, 0.3):
        gradients((torch.tensor(value),))
        assert parameter.grad is gradient
        assert torch.allclose(parameter.grad, torch.tensor(value))


def test_muon_moves_every_direction_of_a_matrix_alike() -> None:
    wide, tall, volume = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 32), (32, 8), (8, 4, 3, 3, 3)))
    muon = Muon([wide, tall, volume])
    muon.rate.fill_(0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in (wide, tall, volume):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad[0] *= 100
    muon.step()
    for parameter, scale in ((wide, 1), (tall, 2), (volume, 1)):
        singular = torch.linalg.svdvals(parameter.detach().flatten(1)) / (0.1 * scale)
        assert singular.min() > 0.6
        assert singular.max() < 1.3


def test_muon_decides_a_direction_by_past_gradients_too() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    muon = Muon([parameter])
    muon.rate.fill_(1.0)
    for sign in (1.0, -0.2):  # the mean is still positive
        parameter.grad = sign * torch.eye(2)
        before = parameter.detach().clone()
        muon.step()
    assert torch.all((parameter - before).diagonal() < 0)


def test_a_step_of_nothing_is_none() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    muon = Muon([parameter])
    muon.rate.fill_(1.0)
    parameter.grad = torch.zeros(2, 3)
    muon.step()
    assert torch.equal(parameter, torch.ones(2, 3))


def test_a_plot_has_a_line_for_each_shape_of_batches(tmp_path: Path) -> None:
    assert fit_experts(Schedule(steps=4, muon_rate=1e-3, log_every=1), tmp_path)
    lines = plot.lines(tmp_path / "experts.jsonl", ("high", "low"))
    # sets 0, 1, 1 in turn, of batches 2, 1 and 1 for each of two experts
    shapes = {label.split()[1]: steps for label, (steps, _) in lines.items() if label.startswith("high")}
    assert shapes == {"2x2x16x2x4x4": [0, 3], "2x1x16x2x4x6": [1, 2]}
    one = plot.plot(tmp_path).stat().st_size
    alone = [json.dumps({"step": step, "batch": [1], "high": 0.5}) for step in range(3)]
    (tmp_path / "experts-high_noise.jsonl").write_text("\n".join(alone))
    assert plot.plot(tmp_path).stat().st_size > one > 1000


def test_losses_fall(tmp_path: Path) -> None:
    model, sets = experts()
    draw, loss = train_experts.noised(SMALL, sets, (4, 4), (0, 1)), train_experts.flow_loss(model)

    def measured() -> float:
        return float(loss(*draw(0, torch.Generator().manual_seed(9)))["loss"].detach())

    before = measured()
    train("experts", model, draw, loss, Schedule(steps=30, muon_rate=1e-2, adam_rate=3e-3, warmup=3), tmp_path)
    after = measured()
    assert after < 0.9 * before


def test_what_is_exported_is_what_was_trained(tmp_path: Path) -> None:
    assert fit_experts(Schedule(steps=2, muon_rate=1e-3), tmp_path)
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


def test_rates_warm_up_and_decay_unless_a_later_stage_continues() -> None:
    schedule = Schedule(steps=1000, muon_rate=1.0, warmup=200, decay=0.5)
    assert [schedule.share(step) for step in (0, 199, 500, 750, 999)] == [0.005, 1, 1, 0.5, 0.01]
    assert Schedule(steps=1000, muon_rate=1.0, decay=0.0).share(999) == 1


def test_the_teacher_ends_where_the_pipeline_ends() -> None:
    model, clips, found = teacher(), experts()[1][0], teacher_paths()
    assert found.samples.shape == (6, 5, 16, 2, 4, 4)
    levels = grid("unipc", 40, SMALL.shift)
    sigmas, chosen = levels.sigmas, levels.experts(SMALL.boundary)
    scales = {"high_noise": SMALL.guidance_high_noise, "low_noise": SMALL.guidance_low_noise}
    guidance = Guidance(chosen, scales, guided_steps(chosen, scales))
    texts = {"prompt": found.text[3:4], "negative_prompt": model.text(clips.ids[-1:], clips.lengths[-1:])}
    tables, samples = rotary_tables((2, 2, 2), SMALL.dit.head_dim, torch.device("cpu")), []

    def predict(step: int, name: Expert, branches: Sequence[Branch], sample: Tensor, timestep: int) -> list[Tensor]:
        expert, at = train_experts.expert_of(model, name), torch.tensor([timestep])
        condition = clips.y[3:4].float()
        return [expert(sample, condition, at, expert.encode_text(texts[b]), tables)[0] for b in branches]

    with torch.no_grad():
        noise = found.samples[3:4, 0].float()
        steps = solve("unipc", levels, 40)
        keep = lambda index, expert, sample: samples.append(sample)  # noqa: E731
        end = denoise(noise, steps, chosen, predict, guidance=guidance, on_sample=keep)
    assert torch.allclose(found.samples[3:4, 4].float(), end, atol=0.02)  # float16 values, from a float16 noise
    for k, level in enumerate((0.9375, 0.8333333, 0.625), start=1):
        near = min(range(40), key=lambda i: abs(sigmas[i + 1] - level))
        assert torch.allclose(found.samples[3:4, k].float(), samples[near], atol=0.1)


def test_the_student_learns_the_teachers_path(tmp_path: Path) -> None:
    model = teacher()
    student = train_lora.Student(model)
    loss, draw = train_lora.path_loss(model, student), train_lora.drawn([teacher_paths()], [4])

    def measured() -> float:
        return float(loss(*draw(0, torch.Generator().manual_seed(9)))["loss"].detach())

    before = measured()
    train("lora", student, draw, loss, Schedule(steps=30, muon_rate=1e-2, warmup=3), tmp_path)
    assert measured() < 0.8 * before


def test_the_loras_are_merged_as_they_were_trained(tmp_path: Path) -> None:
    assert train_lora.fit(teacher(), [teacher_paths()], Schedule(steps=3, muon_rate=1e-2, warmup=1), tmp_path, [2])
    train_lora.export(teacher(), tmp_path, tmp_path / "loras")
    student = train_lora.Student(teacher())
    load_ema(student, tmp_path / "lora.pt")
    for name in EXPERTS:
        file = tmp_path / f"loras/{name}.safetensors"
        merge = merge_of([Lora(f"lora_{name}", file, 1.0, "")], name, SMALL.dit)
        for key, product in getattr(student, name).products():
            weight = train_experts.expert_of(teacher(), name).get_parameter(key)
            merged, _ = merge(key, weight, (0, len(weight)))
            assert product.any()
            assert torch.allclose(merged, weight + product, atol=0.02 * float(product.detach().abs().max()))


def test_the_shipped_pair_fits_in_two_megabytes() -> None:
    with torch.device("meta"):
        student = train_lora.Student(train_experts.TinyModel(SPEC))
    assert sum(parameter.numel() for parameter in student.parameters()) * 2 < 1.95e6  # bf16, and headers
