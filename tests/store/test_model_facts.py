"""Tests a model's JSON files, names and modes: each fault is one line that names the file and the key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from wanfast.runtime.facts.model_spec import A14B, DiTSpec, FactError, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import TINY

Wanfast = Callable[..., Outcome]
GOOD = ("generate", "--image", "cat.png", "--prompt", "a cat", "--size", "64x64", "--frames", "5", "--steps", "2")
HUGE = 10**400


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copies the tiny model, but links its weights, which are 30 MB: remove a link before you write a file there."""
    return Path(shutil.copytree(TINY, tmp_path / "model", copy_function=link_or_copy))


def link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)


def change(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; a dot in a name leads into an object."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for name, value in changes.items():
        owner, _, key = name.rpartition("__")
        (document[owner] if owner else document)[key] = value
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("note", ["a photograph would become a pattern", None])
def test_the_note_of_the_weights_is_shown(model: Path, note: str | None, wanfast: Wanfast) -> None:
    change(model / "wanfast.json", weights_note=note)
    outcome = wanfast(*GOOD, "--model", str(model), "--device", "cpu", "--dry-run", "--json")
    assert outcome.exit_code == 0, outcome.err
    assert (note in outcome.document["plan"]["notes"]) == (note is not None)
    assert outcome.err.count("a photograph would become a pattern") == (note is not None)


SIZES = ["dit__num_heads", "dit__dim", "dit__num_layers", "vae__base_dim", "umt5__vocab_size", "umt5__num_buckets"]
WRONG = [("2", "'2'"), (-2, "-2"), (0, "0"), (True, "True"), (HUGE, "1000"), (float("nan"), "nan"), (None, "None"),
         (2.0, "2.0"), ([2], "(2,)"), ({}, "{}")]  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("value", "shown"), WRONG, ids=[shown for _, shown in WRONG])
def test_a_size_is_a_whole_number(model: Path, name: str, value: object, shown: str) -> None:
    change(model / "wanfast.json", **{name: value})
    with pytest.raises(CorruptArtifactError) as error:
        model_files.locate(str(model), "artifacts")
    key = name.replace("__", ".")
    assert str(error.value).startswith(f"{model}/wanfast.json: {key} {shown}"), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(model)) + 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dit__num_heads", 3),  # does not divide 256
        ("dit__num_heads", 256),  # heads of one number cannot be rotated
        ("dit__freq_dim", 63),
        ("dit__patch_size", [1, 2]),
        ("dit__patch_size", [2, 2, 2]),
        ("dit__eps", 0),
        ("dit__eps", float("inf")),
        ("dit", []),
        ("dit__heads", 2),
        ("vae__dim_mult", [1, 2]),
        ("vae__latents_mean", [0.0]),
        ("vae__latents_mean", ["0"] * 16),
        ("vae__latents_std", [0.0] * 16),
        ("vae__latents_std", [float("nan")] * 16),
        ("vae__temporal_downsample", [False, False, False]),
        ("vae__temporal_downsample", [0, 1, 1]),
        ("umt5__num_heads", 5),
        ("umt5__max_distance", 1),
        ("boundary", 2),
        ("boundary", None),
        ("frames", 7),
        ("frames", "5"),
        ("size", "7x7"),
        ("steps", 0),
        ("guidance_low_noise", float("nan")),
        ("negative_prompt", None),
        ("name", 3),
        ("trained_frames", [None]),
        ("vae", None),
        ("unknown", 1),
    ],
)
def test_facts_that_no_model_has_are_refused(model: Path, name: str, value: object) -> None:
    change(model / "wanfast.json", **{name: value})
    with pytest.raises(CorruptArtifactError) as error:
        model_files.locate(str(model), "artifacts")
    assert f"wanfast.json: {name.replace('__', '.')} " in str(error.value)


def test_networks_that_do_not_fit_each_other_are_refused(model: Path) -> None:
    change(model / "wanfast.json", umt5__dim=48)
    with pytest.raises(CorruptArtifactError, match="reads text embeddings of size 96, but UMT5 gives 48"):
        model_files.locate(str(model), "artifacts").require()
    change(model / "wanfast.json", dit__out_channels=8)
    with pytest.raises(CorruptArtifactError, match="makes latents of 8 channels, but its VAE has 16"):
        model_files.locate(str(model), "artifacts")


DIFFUSERS = {
    "transformer": {
        "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 640, "freq_dim": 64, "in_channels": 36,
        "out_channels": 16, "num_layers": 5, "text_dim": 96, "patch_size": [1, 2, 2], "eps": 1e-6,
    },
    "vae": {
        "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
    },
    "text_encoder": {
        "vocab_size": 960, "d_model": 96, "d_kv": 24, "d_ff": 256, "num_heads": 4, "num_layers": 3,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    },
}  # fmt: skip


@pytest.fixture
def configs(model: Path) -> Path:
    """Returns a model whose facts stand in the files of Diffusers' layout."""
    (model / "wanfast.json").unlink()
    for folder, config in DIFFUSERS.items():
        (model / folder / "config.json").write_text(json.dumps(config))
    return model


def test_the_facts_of_the_public_files_are_read(configs: Path) -> None:
    spec = model_files.locate(str(configs), "artifacts").spec
    assert (spec.dit.dim, spec.dit.num_heads, spec.umt5.attention_dim, spec.vae.base_dim) == (256, 2, 96, 16)


@pytest.mark.parametrize(
    ("folder", "key"), [(folder, key) for folder, config in DIFFUSERS.items() for key in config]
)  # fmt: skip
@pytest.mark.parametrize("value", ["2", -1, None, True, HUGE, [None]], ids=repr)
def test_a_wrong_key_of_a_public_file_is_named(configs: Path, folder: str, key: str, value: object) -> None:
    change(configs / folder / "config.json", **{key: value})
    with pytest.raises(CorruptArtifactError) as error:
        model_files.locate(str(configs), "artifacts")
    assert str(error.value).startswith(f"{configs}/{folder}/config.json: {key} "), error.value


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000, b"9" * 5000, b""], ids=lambda c: repr(c[:4]))
@pytest.mark.parametrize("name", ["wanfast.json", "model_index.json", "transformer/config.json"])
def test_a_file_that_is_no_json_is_one_line(configs: Path, name: str, content: bytes) -> None:
    (configs / name).write_bytes(content)
    with pytest.raises(CorruptArtifactError) as error:
        model_files.locate(str(configs), "artifacts")
    assert str(configs / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("boundary", ["0.9", -1, 2, True])
def test_a_wrong_boundary_is_named(configs: Path, boundary: object) -> None:
    (configs / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    with pytest.raises(CorruptArtifactError, match=r"model_index.json: boundary "):
        model_files.locate(str(configs), "artifacts")


@pytest.mark.parametrize("make", [DiTSpec, VAESpec, UMT5Spec, ModelSpec])
def test_a_spec_is_checked_wherever_it_is_made(make: Any) -> None:
    make()
    with pytest.raises(FactError):
        make(**{"eps": "small"} if make in (DiTSpec, UMT5Spec) else {"name" if make is ModelSpec else "base_dim": 0})
    assert ModelSpec.from_json(json.loads(json.dumps(A14B.to_json()))) == A14B


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "", "a/../x.safetensors", ".", 3, None])
def test_an_index_names_only_files_of_its_folder(model: Path, name: object) -> None:
    """Such a file was loaded, from wherever the name led."""
    folder = model / "transformer"
    shard = shutil.move(folder / "diffusion_pytorch_model.safetensors", model.parent / "x.safetensors")
    assert Path(shard).exists()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out.bias": name}}))
    with pytest.raises(CorruptArtifactError, match=r"index.json (names|has no weight_map)"):
        model_files.locate(str(model), "artifacts").weights("high_noise")


def test_an_index_may_name_a_link_out_of_its_folder(model: Path) -> None:
    """The cache of Hugging Face holds such links."""
    folder, name = model / "transformer", "diffusion_pytorch_model.safetensors"
    shutil.move(folder / name, model.parent / "blob")
    (folder / name).symlink_to(model.parent / "blob")
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"proj_out.bias": name}}))
    assert model_files.locate(str(model), "artifacts").weights("high_noise") == [folder / name]


LONG = "m" * 300


@pytest.mark.parametrize(
    "name", [LONG, f"/{LONG}/x", "~nobody-of-this-name/x", "x\0y"], ids=["long", "deep", "home", "nul"]
)
def test_a_name_that_is_no_path_is_one_line(workdir: Path, name: str) -> None:
    with pytest.raises((ConfigError, MissingArtifactError), match="--model"):
        model_files.locate(name, "artifacts")


def test_in_a_list_a_wrong_name_costs_its_line(wanfast: Wanfast, workdir: Path) -> None:
    lines = [{"model": LONG}, {"model": "tiny"}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--dry-run", "--json", "--device", "cpu")
    assert outcome.exit_code == 6, outcome.err
    assert "File name too long" in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "wanfast.json"]
)
def test_a_file_that_may_not_be_read_is_one_line(
    wanfast: Wanfast, workdir: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It belongs to another user; the suite may run as root, who may read everything."""
    closed, access, read_text = model / name, os.access, Path.read_text

    def read(self: Path, *given: object, **named: object) -> str:
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *given, **named)

    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    monkeypatch.setattr(Path, "read_text", read)
    outcome = wanfast(*GOOD, "--model", str(model), "--device", "cpu")
    assert outcome.exit_code == 4
    assert str(closed) in outcome.err.replace("\n", "") and "Traceback" not in outcome.err


@pytest.mark.parametrize("name", ["is_file", "is_dir"])
def test_a_folder_that_may_not_be_entered_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, name, refuse)
    with pytest.raises((ConfigError, CorruptArtifactError), match="Permission denied"):
        model_files.locate(str(model), "artifacts")


@pytest.mark.parametrize("content", [b"{}", b"", b"\xff\xfe", b'{"model": {"type": "WordLevel", "vocab": {}}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"tokenizer.json"):
        PromptTokenizer(tmp_path / "tokenizer.json", 8).encode("a cat")
    with pytest.raises(MissingArtifactError):
        PromptTokenizer(tmp_path / "other.json", 8)


def test_a_tokenizer_that_fails_on_a_text_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of its Rust library is no Exception."""
    tokenizer = PromptTokenizer(model / "tokenizer/tokenizer.json", 8)

    class Panics:
        def encode(self, text: str) -> object:
            raise BaseException("panicked")

    monkeypatch.setattr(tokenizer, "_tokenizer", Panics())
    with pytest.raises(CorruptArtifactError, match="panicked"):
        tokenizer.encode("a cat")


def test_a_tokenizer_of_more_words_than_the_model_is_refused(wanfast: Wanfast, workdir: Path, model: Path) -> None:
    """UMT5 would look a word up that it does not have."""
    change(model / "wanfast.json", umt5__vocab_size=300)
    file = model / "text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(key for key, tensor in tensors.items() if tensor.shape[0] == 960)
    file.unlink()
    save_file(tensors | {name: tensors[name][:300].clone()}, file)
    outcome = wanfast(*GOOD, "--model", str(model), "--device", "cpu")
    assert outcome.exit_code == 4, outcome.err
    assert "tokenizer.json" in outcome.err and "300" in outcome.err
