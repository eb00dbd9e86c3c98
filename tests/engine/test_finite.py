"""Tests that a value that is not finite becomes an error that says where it was first seen, and never a black video."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Outcome
from tests.on_ranks import on_ranks
from tests.small_model import blank_inputs, frames_of, plan_small_model
from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading
from wanfast.runtime.engine import pipeline as pipeline_module
from wanfast.runtime.errors import NotFiniteError
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import TINY

Wanfast = Callable[..., Outcome]
SMALL = ("--size", "64x64", "--frames", "5", "--steps", "4", "--device", "cpu")
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", *SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_one_value_among_many_is_seen(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 1000).to(dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(torch.ones(3, dtype=torch.int8))
    for value in (torch.nan,) if dtype.itemsize == 1 else (torch.nan, torch.inf, -torch.inf):
        values[500] = value
        assert not all_finite(values) and not all_finite(values[500])


def test_the_largest_values_are_finite() -> None:
    most = torch.finfo(torch.float32).max
    assert all_finite(torch.tensor([most, -most]))


def spoiled(method: Callable[..., Tensor], call: int) -> Callable[..., Tensor]:
    """Returns `method` with a NaN in the last value of its call of this number."""
    calls = iter(range(10**6))

    def spoil(*arguments: object, **options: object) -> Tensor:
        out = method(*arguments, **options)
        if next(calls) == call:
            whole = out[0] if isinstance(out, tuple) else out
            whole[(-1,) * whole.dim()] = torch.nan
        return out

    return spoil


@pytest.mark.parametrize(
    ("owner", "method", "call", "where"),
    [
        (UMT5Encoder, "forward", 0, "UMT5's embedding of the text 'a cat'"),
        (WanVAE, "encode", 0, "the image as the VAE encodes it"),
        (WanDiT, "forward", 0, "the latent after step 1 of 4, by the high-noise expert,"),
        (WanDiT, "forward", 7, "the latent after step 4 of 4, by the low-noise expert,"),
        (WanVAE, "_decode", 1, "the decoded video"),
    ],
)
def test_the_error_says_where(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, where: str
) -> None:
    monkeypatch.setattr(owner, method, spoiled(getattr(owner, method), call))
    outcome = wanfast(*GOOD)
    assert (outcome.exit_code, outcome.out) == (7, "")
    assert f"{where} holds NaN or an infinity" in outcome.err.replace("\n", " "), outcome.err
    assert not (workdir / "out.mp4").exists()
    monkeypatch.undo()


def test_a_tensor_of_an_expert_is_named(wanfast: Wanfast, workdir: Path, tiny_with_nan: Path) -> None:
    outcome = wanfast(*GOOD, "--model", str(tiny_with_nan))
    assert outcome.exit_code == 4
    assert "tensor 'blocks.2.attn1.to_v.weight' holds NaN or an infinity" in outcome.err.replace("\n", " ")
    assert not (workdir / "out.mp4").exists()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "bf16"])
def test_what_is_quantized_is_finite(wanfast: Wanfast, workdir: Path, tiny_with_nan: Path, scheme: str) -> None:
    """A NaN in a row would give a scale that is NaN."""
    model = ("--model", str(tiny_with_nan), "--device", "cpu")
    outcome = wanfast("quantize", *model, "--scheme", scheme, "--expert", "low")
    assert outcome.exit_code == 4
    assert "tensor 'blocks.2.attn1.to_v.weight' holds NaN or an infinity" in outcome.err.replace("\n", " ")
    assert not list((workdir / "artifacts").rglob("*.safetensors"))
    if scheme != "bf16":
        loading = wanfast(*GOOD, "--model", str(tiny_with_nan), "--quantize", scheme, "--quantize-on-the-fly")
        assert loading.exit_code == 4 and "blocks.2.attn1.to_v.weight" in loading.err.replace("\n", " ")


@pytest.fixture
def tiny_with_nan(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "broken"))
    file = folder / "transformer_2/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.2.attn1.to_v.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    return folder


def test_in_a_list_it_costs_its_line(wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": "a cat"}, {"prompt": "a dog"}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(WanDiT, "forward", spoiled(WanDiT.forward, 3))
    outcome = wanfast("generate", "--model", "tiny", "--image", "cat.png", "--jobs", "jobs.jsonl", *SMALL)
    assert outcome.exit_code == 6
    assert "latent after step 2 of 4" in outcome.err.replace("\n", " ")
    assert [path.name for path in workdir.glob("*.mp4")] == ["out-0002.mp4"]


def test_all_ranks_raise_what_one_computed(small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group then makes the next video."""
    plan, files = plan_small_model(small_model)
    image, text = blank_inputs(plan, files)
    forward, decode = WanDiT.forward, WanVAE._decode

    def work(ranks: Ranks) -> list[tuple[str, bool]]:
        own = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
        found = []
        for spoil_forward, spoil_decode in ((ranks.rank == 1, False), (False, True)):
            monkeypatch.setattr(WanDiT, "forward", spoiled(forward, 1) if spoil_forward else forward)
            monkeypatch.setattr(WanVAE, "_decode", spoiled(decode, 0) if spoil_decode else decode)
            with pytest.raises(NotFiniteError) as error:
                frames_of(own, plan, image, text)
            found.append((str(error.value).split(":")[0], error.value.is_agreed))
        monkeypatch.setattr(WanVAE, "_decode", decode)
        frames_of(own, plan, image, text)
        return found

    step = "the latent after step 2 of 4, by the high-noise expert, holds NaN or an infinity"
    assert on_ranks(Mesh(cfg=2), work) == [[(step, True), ("the decoded video holds NaN or an infinity", True)]] * 2


def test_a_stored_embedding_that_is_not_finite_is_made_again(wanfast: Wanfast, workdir: Path) -> None:
    """Older versions stored such embeddings, whose manifests fit them."""
    assert wanfast(*GOOD).exit_code == 0
    first = (workdir / "out.mp4").read_bytes()
    files = sorted((workdir / "artifacts/prompt_embeds").rglob("embeds.safetensors"))
    for file in files:
        save_file({"embeds": torch.full_like(load_file(file)["embeds"], torch.nan)}, file)
        manifest = file.with_name("manifest.json")
        facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {file.name: facts}}))
    outcome = wanfast(*GOOD, "--overwrite")
    assert outcome.exit_code == 0 and "changed after it was made" not in outcome.err, outcome.err
    assert (workdir / "out.mp4").read_bytes() == first
    assert len(files) == 2 and all(all_finite(load_file(file)["embeds"]) for file in files)


def test_unlike_ranks_get_the_leaders_noise(small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike GPUs draw unlike noise from one seed, as these ranks do."""
    plan, files = plan_small_model(small_model)
    draw = pipeline_module.draw_noises

    def work(ranks: Ranks) -> Tensor:
        monkeypatch.setattr(
            pipeline_module, "draw_noises", lambda *given: (noise + ranks.rank for noise in draw(*given))
        )
        image, text = blank_inputs(plan, files)
        own = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
        seen: list[Tensor] = []
        monkeypatch.setattr(pipeline_module, "denoise", lambda noise, *rest, **more: seen.append(noise) or noise)
        frames_of(own, plan, image, text)
        return seen[0].clone()

    expected = next(draw(plan.config.video.seed, plan.geometry, 16, "cpu"))
    for noise in on_ranks(Mesh(cfg=2), work):
        assert torch.equal(noise, expected)


def test_the_texts_keys_of_an_expert_go_with_its_steps(
    small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take 0.8 GB of a GPU."""
    plan, files = plan_small_model(small_model)
    encode, alive = WanDiT.encode_text, []

    def encoded(self: WanDiT, text: Tensor) -> list[object]:
        alive.append(sum(found() is not None for found in keys))
        made = encode(self, text)
        keys.extend(weakref.ref(each.k) for each in made)
        return made

    keys: list[weakref.ref[Tensor]] = []
    monkeypatch.setattr(WanDiT, "encode_text", encoded)
    own = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    frames_of(own, plan, *blank_inputs(plan, files))
    blocks = files.spec.dit.num_layers
    assert alive == [0, blocks, 0, blocks]  # the prompt and the negative prompt of one expert, then of the other


def test_a_text_that_is_not_finite_costs_its_line(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = UMT5Encoder.forward

    def spoil(self: UMT5Encoder, ids: torch.Tensor, *others: object) -> torch.Tensor:
        return forward(self, ids, *others) * (torch.nan if ids.shape[1] > 8 else 1)

    monkeypatch.setattr(UMT5Encoder, "forward", spoil)
    prompts = ["a cat", "a star goes right on a wavy background and then it goes left again", "a dog"]
    lines = [{"prompt": prompt, "negative_prompt": "red", "output": f"{n}.mp4"} for n, prompt in enumerate(prompts)]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--json")
    results = outcome.document["results"]
    assert outcome.exit_code == 6 and ["error" in result for result in results] == [False, True, False]
    assert "UMT5's embedding of the text" in results[1]["error"]
