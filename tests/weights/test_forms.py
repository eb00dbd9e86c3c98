"""Tests experts in the forms of public tools: loaded, each equals its dequantized float64 values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import expert_forms, lora_files
from tests.expert_forms import FORMS, SCALED, file_of
from tests.on_ranks import on_ranks
from tests.one_expert import velocity, write_expert
from tests.sharded import whole
from wanfast.runtime.config import ModelsConfig, QuantizeConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, WanFastError
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.jobs import quantize
from wanfast.runtime.machine import host
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store import expert_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.expert_files import NamedExpert, expert_notes, identified
from wanfast.runtime.store.loras import find_loras
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert
from wanfast.runtime.weights import checkpoint, forms
from wanfast.runtime.weights.builders import build_expert
from wanfast.runtime.weights.key_maps import rename_back
from wanfast.runtime.weights.lora import merge_of

SPEC = DiTSpec(dim=256, ffn_dim=512, num_heads=4, num_layers=2, freq_dim=32, text_dim=48, text_len=16)
ONE = Ranks("cpu")
FP8, INT8 = "fp8 of the distilled repository", "int8 of the distilled repository"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_expert(tmp_path_factory.mktemp("forms") / "source", SPEC)


@pytest.fixture(scope="module")
def weights(source: ModelFiles) -> dict[str, Tensor]:
    return load_file(source.weights("high_noise")[0])


def with_expert(source: ModelFiles, path: Path) -> ModelFiles:
    return dataclasses.replace(source, experts=(NamedExpert("high_noise", path),))


def written(
    source: ModelFiles, weights: Mapping[str, Tensor], folder: Path, form: str
) -> tuple[ModelFiles, dict[str, Tensor]]:
    """Returns (the model with an expert in this form, the expert's values in float64)."""
    file = file_of(folder, form)
    return with_expert(source, file), FORMS[form](file, weights)


def build(files: ModelFiles, precision: Any = "fp32", ranks: Ranks = ONE, **options: Any) -> WanDiT:
    return build_expert(files, "high_noise", precision, ranks, **options)


def state(model: WanDiT) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def equal(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> bool:
    """Whether each float32 value is the float64 value, rounded once."""
    assert got.keys() == exact.keys()
    return all(torch.equal(got[name], exact[name].float()) for name in exact)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_each_form_equals_its_float64_values(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    files, exact = written(source, weights, tmp_path, form)
    got = state(build(files))
    assert equal(got, exact)
    assert not equal(got, {name: tensor.double() for name, tensor in weights.items()})


@pytest.mark.parametrize(("ranks", "sharded"), [(2, False), (2, True)])
@pytest.mark.parametrize("form", [FP8, "fp8 of 2025", "GGUF Q4_K"])
def test_several_ranks_read_their_own_rows(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str,
    ranks: int, sharded: bool,
) -> None:  # fmt: skip
    files, exact = written(source, weights, tmp_path, form)
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)

    def work(own: Ranks) -> bool:
        with torch.no_grad():
            return equal(state(build(files, ranks=own, sharded=sharded)), exact)

    assert on_ranks(Mesh(ulysses=ranks), work) == [True] * ranks


def test_a_large_gguf_tensor_is_dequantized_in_pieces(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, exact = written(source, weights, tmp_path, "GGUF Q6_K")
    monkeypatch.setattr(forms, "_PIECE_VALUES", 7 * 256)
    assert equal(state(build(files)), exact)


@pytest.mark.parametrize("form", expert_forms.GGUF)
def test_a_rank_without_rows_of_a_sharded_gguf_tensor_reads_none(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    files, _ = written(source, weights, tmp_path, form)
    named = files.named("high_noise")
    assert named is not None
    reader = forms._FormReader(named.header(), named.files[0], 1)
    for key, (shape, _) in reader.header().items():
        rows = reader.rows(key, shape[0], shape[0])
        assert (list(rows.shape), rows.dtype) == ([0, *shape[1:]], torch.float32), key


def test_ranks_that_dequantize_at_the_same_time_share_the_cores(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def pool(number: int) -> ThreadPoolExecutor:
        threads.append(number)
        return ThreadPoolExecutor(number)

    monkeypatch.setattr(forms, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(host, "cores", lambda: 12)
    files, _ = written(source, weights, tmp_path, "GGUF Q8_0")
    found = forms.source_of(files, "high_noise", 4)
    reader = found.reader(found.files[0])
    reader.rows(next(key for key, (shape, _) in reader.header().items() if len(shape) == 2), 0, 1)
    assert threads == [3]


@pytest.mark.parametrize("kind", ["index", "no index", "gguf", "diffusers"])
def test_a_folder_of_files(source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    whole, folder = tmp_path / "whole.safetensors", tmp_path / "folder"
    folder.mkdir()
    if kind == "gguf":
        exact = FORMS["GGUF Q8_0"](folder / "one.gguf", weights)
    else:
        exact = FORMS[FP8](whole, weights)
        tensors = load_file(whole)
        if kind == "diffusers":
            exact = FORMS["fp16"](whole, weights)
            tensors = {rename_back("dit", "diffusers", key): tensor for key, tensor in load_file(whole).items()}
        first = {
            key: tensor for key, tensor in tensors.items() if not key.endswith("_scale")
        }  # a weight without its own
        parts = {"a.safetensors": first, "b.safetensors": {k: v for k, v in tensors.items() if k not in first}}
        for name, part in parts.items():
            expert_forms.save(folder / name, part)
        if kind == "index":
            places = {key: name for name, part in parts.items() for key in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
            expert_forms.save(folder / "old.safetensors", first)
    assert equal(state(build(with_expert(source, folder))), exact)


TAKEN: list[tuple[str, Scheme]] = [
    (form, scheme)
    for form in SCALED
    for scheme in (("fp8-rowwise",) if "fp8" in form else ("int8-dynamic", "int8-weight-only"))
]


@pytest.mark.parametrize(("form", "scheme"), TAKEN)
@torch.no_grad()
def test_numbers_of_8_bits_are_taken_without_a_second_rounding(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, form: str, scheme: Scheme
) -> None:
    files, exact = written(source, weights, tmp_path, form)
    quantized = QuantizedExpert(ArtifactStore(tmp_path), files, "high_noise", scheme, "model")
    got = state(build(files, "bf16", quantized=quantized, on_the_fly=True))
    for name, values in exact.items():
        if f"{name.removesuffix('weight')}scale" in got:
            assert torch.equal(
                got[name].double() * got[f"{name.removesuffix('weight')}scale"].double()[:, None], values
            )
        else:
            assert torch.equal(got[name], values.to(got[name].dtype))
    assert sum(name.endswith(".scale") for name in got) == 10 * SPEC.num_layers


@pytest.mark.parametrize(("form", "scheme"), [(FP8, "fp8-rowwise"), ("int8 of 2026", "int8-dynamic")])
@torch.no_grad()
def test_stored_experts_hold_the_same_numbers(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str,
    scheme: Scheme,
) -> None:  # fmt: skip
    files, _ = written(source, weights, tmp_path, form)
    monkeypatch.setattr(quantize, "_CHUNK_VALUES", 100 * 256)
    config = QuantizeConfig(
        model=str(source.root), scheme=scheme, expert="high", device="cpu", artifacts_dir=str(tmp_path / "store"),
        high_noise_expert=str(file_of(tmp_path, form)),
    )  # fmt: skip
    (result,) = quantize.run(config)
    assert result["relative_error"] == 0.0
    stored, plain = (
        QuantizedExpert(ArtifactStore(tmp_path / "store"), each, "high_noise", scheme, str(source.root))
        for each in (files, source)
    )
    assert stored.find() is not None and plain.find() is None
    assert f"--high-noise-expert {file_of(tmp_path, form)}" in stored.fix
    kept = state(build(files, "bf16", quantized=stored))
    fly = state(build(files, "bf16", quantized=stored, on_the_fly=True))
    assert all(torch.equal(kept[name].float(), fly[name].float()) for name in fly)


def test_two_ranks_take_numbers_of_8_bits(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = written(source, weights, tmp_path, FP8)
    quantized = QuantizedExpert(ArtifactStore(tmp_path), files, "high_noise", "fp8-rowwise", "model")
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)

    def weights_of(ranks: Ranks) -> dict[str, Tensor]:
        model = build(files, "bf16", ranks, quantized=quantized, on_the_fly=True)
        return {name: tensor.float() for name, tensor in state(model).items()}

    one = weights_of(ONE)
    for found in on_ranks(Mesh(ulysses=2), weights_of):
        assert all(torch.equal(found[name], one[name]) for name in one)


@pytest.mark.parametrize("form", [FP8, "fp8 of 2025", "GGUF Q5_K", "fp16"])
@torch.no_grad()
def test_loras_are_merged_into_the_dequantized_weights(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    files, exact = written(source, weights, tmp_path, form)
    wanted = lora_files.of_blocks(SPEC)
    tensors, adds = lora_files.low_rank(wanted, {module: module for module in wanted}, alpha=2.0)
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    loras = find_loras(ModelsConfig(lora=(f"{file}@0.5",)), tmp_path)
    got = state(build(files, merge=merge_of(loras, "high_noise", SPEC)))
    for name, values in exact.items():
        wanted_values = values + 0.5 * adds[name] if name in adds else values
        assert (got[name].double() - wanted_values).norm() <= 1e-6 * wanted_values.norm()
    assert velocity(build(files, "bf16", merge=merge_of(loras, "high_noise", SPEC))).isfinite().all()


def changed(file: Path, **changes: Tensor | None) -> None:
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    expert_forms.save(file, tensors)


Q = "blocks.0.self_attn.q"
OF_2026 = "fp8 of 2026"


def mark(**keys: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(keys).encode()), dtype=torch.uint8)


WRONG: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "no scale": (FP8, {f"{Q}.weight_scale": None}, f"'{Q}.weight' is stored as F8_E4M3 without a scale"),
    "no weight": (FP8, {f"{Q}.weight": None}, f"'{Q}.weight_scale' is a scale without a weight"),
    "two scales": (FP8, {f"{Q}.scale_weight": torch.ones(())}, f"is a second scale of '{Q}.weight'"),
    "scale of blocks": (FP8, {f"{Q}.weight_scale": torch.ones(256, 2)}, "[256, 2]: one number, or one for each row"),
    "scale of 8 bits": (FP8, {f"{Q}.weight_scale": torch.ones(256, 1).to(torch.uint8)}, "is stored as U8, not F32"),
    "NaN in a scale": (FP8, {f"{Q}.weight_scale": torch.full((256, 1), torch.nan)}, f"'{Q}.weight' holds NaN or an"),
    "NaN in e5m2": (
        "e5m2 of 2026", {f"{Q}.weight": torch.full((256, 256), torch.inf).to(torch.float8_e5m2)}, "holds NaN or an inf",
    ),
    "another format": (OF_2026, {f"{Q}.comfy_quant": mark(format="nvfp4")}, f"'{Q}' is stored as F8_E4M3, but its"),
    "rotated": (
        "int8 of 2026", {f"{Q}.comfy_quant": mark(format="int8_tensorwise", convrot=True)}, "'int8_tensorwise, conv",
    ),
    "mark of another kind": (OF_2026, {f"{Q}.comfy_quant": mark(format="int8_tensorwise")}, "entry says 'int8_"),
    "damaged mark": (OF_2026, {f"{Q}.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "or is not a safe"),
    "more tensors": (FP8, {f"{Q}.weight_zero": torch.ones(1)}, f"unexpected tensor '{Q}.weight_zero'"),
    "image tower": ("fp16", {"img_emb.proj.0.weight": torch.ones(1)}, "unexpected tensor 'img_emb.proj.0.weight'"),
    "missing": ("fp16", {"head.head.bias": None}, "missing tensor 'head.head.bias'"),
    "of text-to-video": (
        "fp16", {"patch_embedding.weight": torch.ones(256, 16, 1, 2, 2)}, "[256, 16, 1, 2, 2], not [256, 36, 1, 2, 2]",
    ),
    "twice": ("fp16", {"diffusion_model.head.head.bias": torch.ones(64)}, "head.head.bias' is present twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused_by_its_name(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    form, changes, words = WRONG[kind]
    files, _ = written(source, weights, tmp_path, form)
    changed(file_of(tmp_path, form), **changes)
    with pytest.raises(CorruptArtifactError) as caught:
        build(files)
    message = str(caught.value)
    print(message)
    assert words in message and str(file_of(tmp_path, form)) in message and "\n" not in message


@pytest.mark.parametrize("ending", ["weight", "weight_scale"])
def test_numbers_that_are_taken_must_be_finite(
    source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path, ending: str
) -> None:
    files, _ = written(source, weights, tmp_path, FP8)
    tensor = load_file(file_of(tmp_path, FP8))[f"{Q}.{ending}"]
    changed(file_of(tmp_path, FP8), **{f"{Q}.{ending}": torch.full(tensor.shape, torch.nan).to(tensor.dtype)})
    quantized = QuantizedExpert(ArtifactStore(tmp_path), files, "high_noise", "fp8-rowwise", "model")
    with pytest.raises(CorruptArtifactError, match=f"'{Q}.weight' holds NaN or an infinity"):
        build(files, "bf16", quantized=quantized, on_the_fly=True)


@pytest.mark.parametrize("name", ["one.safetensors", "one.gguf"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"GGUF\x03\0\0\0", b"\x10" * 100])
def test_a_file_that_is_damaged_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=rf"--high-noise-expert .*{name}: .*: it is damaged, or is not a"):
        NamedExpert("high_noise", tmp_path / name).header()


def test_a_truncated_gguf_is_one_line(source: ModelFiles, weights: dict[str, Tensor], tmp_path: Path) -> None:
    files, _ = written(source, weights, tmp_path, "GGUF Q8_0")
    file = file_of(tmp_path, "GGUF Q8_0")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CorruptArtifactError, match="it is damaged, or is not a GGUF file"):
        build(files)


def test_a_type_that_the_package_cannot_read_is_refused(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMS["GGUF Q8_0"](tmp_path / "one.gguf", weights)
    monkeypatch.setattr(expert_files, "_readable", lambda kinds: {*kinds} - {"Q8_0"})
    with pytest.raises(CorruptArtifactError, match="is stored as Q8_0, which the package gguf cannot read: use a file"):
        NamedExpert("high_noise", tmp_path / "one.gguf").header()
    monkeypatch.undo()
    assert expert_files._readable(["Q4_K", "F32", "I32", "Q8_K"]) == {"Q4_K", "F32"}


def test_without_its_package_gguf_is_refused_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(expert_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: run `pip install 'wanfast\[gguf\]'`$"):
        NamedExpert("low_noise", tmp_path / "one.gguf").header()


def config_of(tmp_path: Path, **options: Any) -> ModelsConfig:
    return ModelsConfig(model="tiny", artifacts_dir=str(tmp_path / "artifacts"), **options)


@pytest.mark.parametrize(
    ("form", "scheme", "fix"),
    [
        (FP8, "int8-dynamic", "use --quantize fp8-rowwise, or drop --quantize"),
        (INT8, "fp8-rowwise", "use --quantize int8-dynamic, or drop --quantize"),
    ],
)
def test_a_scheme_that_would_round_a_second_time_is_refused(
    weights: dict[str, Tensor], tmp_path: Path, form: str, scheme: Scheme, fix: str
) -> None:
    file = file_of(tmp_path, form)
    FORMS[form](file, weights)
    with pytest.raises(ConfigError, match=f"would round them a second time: {fix}$"):
        identified(config_of(tmp_path, quantize=scheme, high_noise_expert=str(file)))
    identified(config_of(tmp_path, quantize="bf16", high_noise_expert=str(file)))
    with pytest.raises(ConfigError, match=r"use --scheme .*, or use --scheme bf16$"):
        quantize.run(
            QuantizeConfig(model="tiny", scheme=scheme, high_noise_expert=str(file), artifacts_dir=str(tmp_path))
        )


def test_loras_on_numbers_of_8_bits_are_refused_only_with_a_scheme(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = file_of(tmp_path, FP8)
    FORMS[FP8](file, weights)
    lora = lora_files.write(tmp_path / "lora.safetensors", {f"{Q}.diff_b": torch.ones(96)})
    options: dict[str, Any] = {"high_noise_expert": str(file), "lora_high_noise": (str(lora),)}
    with pytest.raises(ConfigError, match="after the merge would round them a second time: drop --quantize, or use an"):
        identified(config_of(tmp_path, quantize="fp8-rowwise", **options))
    identified(config_of(tmp_path, **options))
    options["lora_low_noise"] = options.pop("lora_high_noise")  # the other expert
    identified(config_of(tmp_path, quantize="fp8-rowwise", **options))
    FORMS["GGUF Q8_0"](tmp_path / "one.gguf", weights)  # its weights are rounded a second time anyway
    given = {"low_noise_expert": str(tmp_path / "one.gguf"), "lora": (str(lora),)}
    identified(config_of(tmp_path, quantize="fp8-rowwise", **given))


@pytest.mark.parametrize(
    ("form", "has_note"), [("GGUF Q4_K", True), ("e5m2 of 2026", True), (FP8, False), ("fp16", False)]
)
def test_a_second_rounding_that_cannot_be_avoided_is_noted(
    weights: dict[str, Tensor], tmp_path: Path, form: str, has_note: bool
) -> None:
    file = file_of(tmp_path, form)
    FORMS[form](file, weights)
    notes = expert_notes(config_of(tmp_path, quantize="fp8-rowwise", low_noise_expert=str(file)))
    assert [f"--low-noise-expert {file.name}: " in note and "a second time" in note for note in notes] == [
        True
    ] * has_note
    assert expert_notes(config_of(tmp_path, low_noise_expert=str(file))) == []


def test_the_form_in_words(weights: dict[str, Tensor], tmp_path: Path) -> None:
    said = {}
    for form in (FP8, "fp8 of 2025", "GGUF Q5_K", "fp16"):
        FORMS[form](file_of(tmp_path, form), weights)
        said[form] = NamedExpert("high_noise", file_of(tmp_path, form)).header().form
    assert list(said.values()) == [
        "BF16 F8_E4M3, scaled by row", "BF16 F8_E4M3, scaled by tensor", "GGUF BF16 F16 F32 Q5_K", "F16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("none.safetensors", None, "none.safetensors: no such file: check the path"),
        ("one.bin", "file", "one.bin: no weights that can be read: give a file that ends in .safetensors or .gguf, or"),
        ("empty", "folder", "empty: no weights that can be read"),
        ("two", "two", "two: this folder holds 2 .gguf files: give one of them"),
        (
            "wan2.2_i2v_low_noise_14B.gguf",
            "file",
            "the file's name mentions the other expert: use --low-noise-expert, or",
        ),
    ],
)
def test_a_path_that_names_no_expert(tmp_path: Path, name: str, kind: str | None, words: str) -> None:
    path = tmp_path / name
    if kind == "file":
        path.touch()
    elif kind is not None:
        path.mkdir()
    for file in ("a.gguf", "b.gguf") if kind == "two" else ():
        (path / file).touch()
    with pytest.raises(WanFastError) as caught:
        identified(config_of(tmp_path, high_noise_expert=str(path)))
    assert words in str(caught.value) and str(caught.value).startswith(f"--high-noise-expert {tmp_path}")
