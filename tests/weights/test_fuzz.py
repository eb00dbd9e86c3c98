"""Damages weights and model files: each is read, or refused in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from tests.damage import VALUES, changed, counts, damage, damaged
from tests.expert_forms import FORMS, file_of
from tests.store.test_model_facts import DIFFUSERS
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts.model_spec import UMT5Spec
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store import model_files, shards
from wanfast.runtime.store.expert_files import NamedExpert
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.forms import source_of

SPEC = UMT5Spec(vocab_size=3, dim=2, attention_dim=2, ffn_dim=2, num_heads=1, num_layers=1)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach().clone() for name, tensor in UMT5Encoder(SPEC, torch.float32).state_dict().items()}


def load(file: Path) -> None:
    with torch.device("meta"):
        model = UMT5Encoder(SPEC, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(model, checkpoint.Source([file], "umt5", "original"), Ranks("cpu"))
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@counts(150)
def test_headers_of_safetensors(tmp_path: Path, examples: int) -> None:
    content, file = save(tensors()), tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")

    def check(new: bytes) -> None:
        file.write_bytes(new)
        load(file)

    damage(damaged(content, header), check, examples)


@counts(150)
def test_facts_in_headers_of_safetensors(tmp_path: Path, examples: int) -> None:
    content, file = save(tensors()), tmp_path / "model.safetensors"
    size = int.from_bytes(content[:8], "little")
    facts = json.loads(content[8 : 8 + size])

    def check(new: object) -> None:
        header = json.dumps(new).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        load(file)

    damage(changed(facts), check, examples)


@counts(100)
@pytest.mark.parametrize("form", ["GGUF Q8_0", "GGUF Q4_K", "fp8 of 2026", "int8 of 2026 by row, metadata"])
def test_files_of_experts(tmp_path: Path, form: str, examples: int) -> None:
    file = file_of(tmp_path, form)
    FORMS[form](file, {"ffn.weight": torch.randn(2, 256), "ffn.bias": torch.randn(2)})
    content = file.read_bytes()

    def check(new: bytes) -> None:
        file.write_bytes(new)
        model = torch.nn.ModuleDict({"ffn": torch.nn.Linear(256, 2, device="meta")})
        files = dataclasses.replace(TINY_FILES, experts=(NamedExpert("high_noise", file),))
        checkpoint.load(model, source_of(files, "high_noise"), Ranks("cpu"))
        assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())

    damage(damaged(content), check, examples)


@counts(100)
def test_pth_files(tmp_path: Path, examples: int) -> None:
    stream, file = io.BytesIO(), tmp_path / "model.pth"
    torch.save(tensors(), stream)

    def check(new: bytes) -> None:
        file.write_bytes(new)
        load(file)

    damage(damaged(stream.getvalue()), check, examples)


@counts(150)
def test_pickles_in_pth_files(tmp_path: Path, examples: int) -> None:
    stream, file = io.BytesIO(), tmp_path / "model.pth"
    torch.save(tensors(), stream)
    with zipfile.ZipFile(stream) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickle = next(name for name in parts if name.endswith("data.pkl"))

    def check(new: bytes) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in (parts | {pickle: new}).items():
                archive.writestr(name, content)
        load(file)

    damage(damaged(parts[pickle]), check, examples)


TINY_FILES = model_files.locate("tiny", "artifacts")
OPTIONS = {"image": "cat.png", "prompt": "a cat", "device": "cpu"}


@counts(200)
def test_facts_of_a_model(workdir: Path, examples: int) -> None:
    """A model whose facts are accepted is planned too."""
    Image.new("RGB", (64, 48)).save("cat.png")
    folder = workdir / "model"
    for place_ in ("transformer", "tokenizer"):
        (folder / place_).mkdir(parents=True)
    (folder / "tokenizer/tokenizer.json").write_bytes((TINY / "tokenizer/tokenizer.json").read_bytes())

    def check(facts: object) -> None:
        (folder / "wanfast.json").write_text(json.dumps(facts))
        plan, _ = resolve(OPTIONS | {"model": str(folder)})
        (placed,) = place([plan])
        json.dumps(plan_json(placed))

    facts = dataclasses.asdict(model_files.locate("tiny", "artifacts").spec)
    damage(changed(json.loads(json.dumps(facts))), check, examples)


@counts(150)
def test_configs_of_the_public_layouts(tmp_path: Path, examples: int) -> None:
    for folder in DIFFUSERS:
        (tmp_path / folder).mkdir()

    def check(configs: dict[str, object]) -> None:
        for folder in DIFFUSERS:
            (tmp_path / folder / "config.json").write_text(json.dumps(configs.get(folder, {})))
        model_files.locate(str(tmp_path), "artifacts").require()

    damage(changed(DIFFUSERS), check, examples)


@counts(400)
def test_bytes_of_a_models_json(tmp_path: Path, examples: int) -> None:
    (tmp_path / "transformer").mkdir()
    content = (TINY / "wanfast.json").read_bytes()

    def check(new: bytes) -> None:
        (tmp_path / "wanfast.json").write_bytes(new)
        model_files.locate(str(tmp_path), "artifacts")

    damage(damaged(content), check, examples)


@counts(150)
def test_indices_of_shards(tmp_path: Path, examples: int) -> None:
    index = tmp_path / "model.safetensors.index.json"

    def check(weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        for file in shards.indexed_shards(index):
            assert tmp_path in file.parents and ".." not in file.parts

    damage(VALUES, check, examples)
    damage(changed({"a": "x.safetensors", "b": "y/../z", "c": "/etc/x"}), check, examples)
