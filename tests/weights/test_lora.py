"""Tests merged LoRAs against diffusers' and peft's own merge and against float64, on ranks, quantized, and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from torch import Tensor

from tests import lora_files
from tests.lora_files import RANK, diffusers, factors, low_rank, modules, of_blocks, product, underscored
from tests.on_ranks import on_ranks
from tests.one_expert import velocity, write_expert
from tests.parity import relative_error
from tests.sharded import whole
from wanfast.runtime.config import ModelsConfig, QuantizeConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, WanFastError
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.jobs import quantize
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.loras import find_loras
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.builders import build_expert, refill_expert
from wanfast.runtime.weights.experts import OffloadedExperts, ResidentExperts
from wanfast.runtime.weights.key_maps import rename, rename_back
from wanfast.runtime.weights.lora import merge_of

SPEC = DiTSpec(dim=64, ffn_dim=80, num_heads=4, num_layers=2, freq_dim=32, text_dim=24, text_len=16)
MODULES, OF_BLOCKS = modules(SPEC), of_blocks(SPEC)
ONE = Ranks("cpu")
OURS = {module: module for module in MODULES}
THEIRS = {module: diffusers(module) for module in MODULES}


@pytest.fixture
def source(tmp_path: Path) -> ModelFiles:
    torch.manual_seed(0)
    return write_expert(tmp_path / "source", SPEC)


def prefixed(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {module: prefix + name for module, name in names.items()}


def build(source: ModelFiles, *loras: str, ranks: Ranks = ONE, precision: Any = "fp32", **options: Any) -> WanDiT:
    """Returns the high-noise expert, merged with the LoRAs that both experts get."""
    found = find_loras(ModelsConfig(lora=loras), source.root.parent)
    return build_expert(
        source, "high_noise", precision, ranks, merge=merge_of(found, "high_noise", source.spec.dit), **options
    )


def state(model: WanDiT) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def worst(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(relative_error(got[name], expected[name]) for name in got)


def added(source: ModelFiles, *changes: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the source's weights with (strength, what a LoRA adds), all in float64."""
    sums = {name: tensor.double() for name, tensor in state(build(source)).items()}
    for strength, merged in changes:
        for name, change in merged.items():
            sums[name] = sums[name] + strength * change
    return sums


def by_diffusers(source: ModelFiles, file: Path, strength: float) -> dict[str, Tensor]:
    """Returns the weights, under our names, that diffusers and peft fuse with the file."""
    model = WanTransformer3DModel(
        num_attention_heads=SPEC.num_heads, attention_head_dim=SPEC.head_dim, in_channels=SPEC.in_channels,
        out_channels=SPEC.out_channels, text_dim=SPEC.text_dim, freq_dim=SPEC.freq_dim, ffn_dim=SPEC.ffn_dim,
        num_layers=SPEC.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    ours = state(build(source))
    model.load_state_dict({rename_back("dit", "diffusers", name): tensor for name, tensor in ours.items()})
    tensors, metadata = WanLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True, local_files_only=True)
    WanLoraLoaderMixin.load_lora_into_transformer(tensors, model, adapter_name="one", metadata=metadata)
    model.fuse_lora(lora_scale=strength)
    model.unload_lora()
    return {rename("dit", "diffusers", name): tensor for name, tensor in model.state_dict().items()}


PEFT_CONFIG = {
    "transformer.r": RANK,
    "transformer.lora_alpha": 5,
    "transformer.target_modules": list(map(diffusers, OF_BLOCKS)),
}


def format_a(alpha: float | None, wanted: Mapping[str, list[int]]) -> dict[str, Tensor]:
    names = prefixed("diffusion_model.", OURS)
    tensors, _ = low_rank(wanted, names, alpha=alpha)
    return tensors | {f"{names[module]}.diff_b": torch.randn(shape[0]) for module, shape in wanted.items()}


PUBLIC: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "a": lambda: (format_a(2.0, OF_BLOCKS), {}),
    "a, all but the patches": lambda: (
        format_a(None, {module: shape for module, shape in MODULES.items() if module != "patch_embedding"}), {},
    ),
    "b": lambda: (
        low_rank(OF_BLOCKS, prefixed("lora_unet_", {m: underscored(m) for m in MODULES}), alpha=2.0)[0], {},
    ),
    "c": lambda: (
        low_rank(OF_BLOCKS, prefixed("transformer.", THEIRS), down="lora_A.weight", up="lora_B.weight")[0],
        {"format": "pt", "lora_adapter_metadata": PEFT_CONFIG},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLIC)
@torch.no_grad()
def test_merged_weights_equal_those_of_diffusers_and_peft(source: ModelFiles, tmp_path: Path, kind: str) -> None:
    tensors, metadata = PUBLIC[kind]()
    file = lora_files.write(tmp_path / "one.safetensors", tensors, metadata)
    expected = by_diffusers(source, file, 0.75)
    plain, got = state(build(source)), state(build(source, f"{file}@0.75"))
    changed = {name for name in plain if not torch.equal(plain[name], got[name])}
    assert len(changed) == len([key for key in tensors if key.endswith(("lora_up.weight", "lora_B.weight", "diff_b"))])
    assert worst(got, expected) <= 1e-6


FLAT_OURS = {module: underscored(module) for module in MODULES}
FLAT_THEIRS = {module: underscored(name) for module, name in THEIRS.items()}
A_AND_B = {"down": "lora_A.weight", "up": "lora_B.weight"}
OF_ADAPTER = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
SPELLINGS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a of other tools": (prefixed("model.diffusion_model.", OURS), {"alpha": 2.0}),
    "a without prefix": (OURS, {**A_AND_B}),
    "b with two underscores": (prefixed("lora_unet__", FLAT_OURS), {"alpha": 2.0}),
    "c without prefix": (THEIRS, {**A_AND_B}),
    "c with alphas": (prefixed("transformer.", THEIRS), {**A_AND_B, "alpha": 1.0}),
    "d with original names": (prefixed("base_model.model.", OURS), {**A_AND_B}),
    "d with Diffusers names": (prefixed("base_model.model.", THEIRS), {**A_AND_B}),
    "e": (prefixed("pipe.dit.", OURS), {**OF_ADAPTER}),
    "e, bare": (OURS, {**OF_ADAPTER}),
    "f": (prefixed("lycoris_", FLAT_THEIRS), {"alpha": 2.0}),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@torch.no_grad()
def test_every_spelling_of_every_module_equals_float64(source: ModelFiles, tmp_path: Path, kind: str) -> None:
    names, options = SPELLINGS[kind]
    tensors, merged = low_rank(MODULES, names, **options)
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    assert worst(state(build(source, f"{file}@-1.5")), added(source, (-1.5, merged))) <= 1e-6


@pytest.mark.parametrize("theirs", [False, True])
@torch.no_grad()
def test_differences_of_all_tensors_are_added(source: ModelFiles, tmp_path: Path, theirs: bool) -> None:
    """Norms and modulations too, which public loaders drop."""
    merged = {name: torch.randn(tensor.shape).double() for name, tensor in state(build(source)).items()}
    tensors = {}
    for name, change in merged.items():
        spelled = rename_back("dit", "diffusers", name) if theirs else name
        path, _, last = spelled.rpartition(".")
        endings = {"weight": f"{path}.diff", "bias": f"{path}.diff_b", "modulation": f"{path}.diff_m"}
        tensors[f"diffusion_model.{endings.get(last, f'{spelled}.diff')}"] = change.float()
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    exact = {name: change.float().double() for name, change in merged.items()}
    assert worst(state(build(source, f"{file}@0.5")), added(source, (0.5, exact))) <= 1e-6


METADATA: dict[str, tuple[dict[str, object], dict[str, object] | None, float]] = {
    "none": ({}, None, 1.0),
    "of a trainer": ({"ss_network_alpha": "6", "ss_network_dim": "3"}, None, 2.0),
    "of Diffusers": ({"lora_adapter_metadata": {"transformer.lora_alpha": 6, "transformer.r": RANK}}, None, 2.0),
    "of PEFT": ({}, {"lora_alpha": 6, "r": RANK, "use_rslora": False}, 2.0),
    "of PEFT, stabilised": ({}, {"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(RANK)),
    "of PEFT, by module": ({}, {"lora_alpha": 1, "alpha_pattern": {"attn1.to_q": 12, r"blocks\.1\.attn2.*": 3}}, 0.0),
}


@pytest.mark.parametrize("kind", METADATA)
@torch.no_grad()
def test_alpha_without_a_tensor_is_that_of_the_metadata(source: ModelFiles, tmp_path: Path, kind: str) -> None:
    metadata, config, factor = METADATA[kind]
    wanted = {
        module: OF_BLOCKS[module] for module in ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2")
    }
    prefix = "transformer." if config is None else "base_model.model."
    tensors, merged = low_rank(wanted, prefixed(prefix, THEIRS), down="lora_A.weight", up="lora_B.weight")
    file = lora_files.write(tmp_path / "one.safetensors", tensors, metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors_of = dict.fromkeys(merged, factor)
    if not factor:
        factors_of = {name: alpha / RANK for name, alpha in zip(merged, (12, 3, 1), strict=True)}
    exact = {name: change * factors_of[name] for name, change in merged.items()}
    assert worst(state(build(source, str(file))), added(source, (1.0, exact))) <= 1e-6


@torch.no_grad()
def test_the_config_of_peft_belongs_to_the_digest(tmp_path: Path) -> None:
    tensors, _ = low_rank(OF_BLOCKS, prefixed("base_model.model.", OURS), **A_AND_B)
    lora_files.write(tmp_path / "one.safetensors", tensors)
    named, found = ModelsConfig(lora=(str(tmp_path / "one.safetensors"),)), set()
    for alpha in (None, 1, 2):
        if alpha is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found |= {lora.sha256 for lora in find_loras(named, tmp_path)}
    assert len(found) == 3


@torch.no_grad()
def test_a_bias_of_the_second_factor_is_scaled_like_the_product(source: ModelFiles, tmp_path: Path) -> None:
    tensors, merged = low_rank(OF_BLOCKS, prefixed("transformer.", THEIRS), **A_AND_B, alpha=6.0)
    name = "blocks.0.ffn.0.bias"
    tensors["transformer.blocks.0.ffn.net.0.proj.lora_B.bias"] = bias = torch.randn(SPEC.ffn_dim)
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    merged[name] = bias.double() * 6 / RANK
    assert worst(state(build(source, str(file))), added(source, (1.0, merged))) <= 1e-6


def two(tmp_path: Path) -> tuple[list[str], list[tuple[float, dict[str, Tensor]]]]:
    """Writes two LoRAs, of which the second also holds differences; returns their options and what they add."""
    torch.manual_seed(3)
    one, adds_one = low_rank(MODULES, prefixed("diffusion_model.", OURS), alpha=2.0)
    other, adds_other = low_rank(OF_BLOCKS, prefixed("transformer.", THEIRS), **A_AND_B)
    other["blocks.1.diff_m"] = torch.randn(1, 6, SPEC.dim)
    files = [
        lora_files.write(tmp_path / name, tensors)
        for name, tensors in (("1.safetensors", one), ("2.safetensors", other))
    ]
    adds_other["blocks.1.modulation"] = other["blocks.1.diff_m"].double()
    return [f"{files[0]}@0.5", f"{files[1]}@-0.3"], [(0.5, adds_one), (-0.3, adds_other)]


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, False), (4, True)])
@torch.no_grad()
def test_two_loras_on_several_ranks(
    source: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, sharded: bool
) -> None:
    """A rank multiplies only its own rows."""
    options, changes = two(tmp_path)
    expected = added(source, *changes)
    one = velocity(build(source, *options))
    assert relative_error(one, velocity(build(source))) > 0.1
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)

    def work(own: Ranks) -> tuple[float, float]:
        model = build(source, *options, ranks=own, sharded=sharded)
        return worst(state(model), expected), relative_error(velocity(model), one)

    for weights, forward in [work(Ranks("cpu"))] if ranks == 1 else on_ranks(Mesh(ulysses=ranks), work):
        assert weights <= 1e-6 and forward <= 1e-5


def test_a_rank_reads_only_its_rows_of_the_second_factor(
    source: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_read: list[int]
) -> None:
    options, _ = two(tmp_path)
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)

    def work(own: Ranks) -> int:
        bytes_read.clear()
        build(source, *options, ranks=own)
        return sum(bytes_read)

    whole = work(Ranks("cpu"))
    downs = 4 * RANK * sum(math.prod(shape[1:]) for wanted in (MODULES, OF_BLOCKS) for shape in wanted.values())
    for read in on_ranks(Mesh(ulysses=4), work):
        assert read < downs + (whole - downs) * 0.27  # every rank reads the alphas itself


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-rowwise", "bf16"])
@torch.no_grad()
def test_stored_merged_experts_are_those_that_are_merged_while_loading(
    source: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)
    options, _ = two(tmp_path)
    config = QuantizeConfig(
        model=str(source.root), scheme=scheme, expert="high", device="cpu", artifacts_dir=str(tmp_path / "store"),
        lora=tuple(options),
    )  # fmt: skip
    quantize.run(config)
    loras = find_loras(config, tmp_path)
    stored, plain = (
        QuantizedExpert(ArtifactStore(tmp_path / "store"), source, "high_noise", scheme, str(source.root), own)
        for own in (loras, ())
    )
    assert stored.find() is not None and plain.find() is None and "loras" not in plain.inputs(None, None)
    assert f"--lora {options[0]}" in stored.fix

    def forward(ranks: Ranks, on_the_fly: bool) -> Tensor:
        quantized = None if scheme == "bf16" and on_the_fly else stored
        fly = on_the_fly and quantized is not None
        return velocity(build(source, *options, ranks=ranks, precision="bf16", quantized=quantized, on_the_fly=fly))

    one = forward(Ranks("cpu"), on_the_fly=True)
    assert torch.equal(forward(Ranks("cpu"), on_the_fly=False), one)
    exact = velocity(build(source, *options))
    assert relative_error(one, exact) < {"bf16": 0.02, "fp8-rowwise": 0.2}.get(scheme, 0.06)
    for size in (2, 4):
        for got in on_ranks(Mesh(ulysses=size), lambda ranks: forward(ranks, on_the_fly=True)):
            assert relative_error(got, one) <= (5e-3 if scheme == "bf16" else 2e-2)


Q = "diffusion_model.blocks.0.self_attn.q"
DOWN, UP = factors(OF_BLOCKS["blocks.0.self_attn.q"])
GOOD = {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP}
WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "rank": ({f"{Q}.lora_up.weight": UP[:, :2]}, f"{Q}.lora_up.weight' has the shape [64, 2], but "),
    "shape in": (
        {f"{Q}.lora_down.weight": DOWN[:, :9]},
        "a change of the shape [64, 9], but the weight has the shape [64, 64]",
    ),
    "shape out": (
        {f"{Q}.lora_up.weight": UP[:9]},
        "a change of the shape [9, 64], but the weight has the shape [64, 64]",
    ),
    "block": ({"blocks.7.self_attn.q.diff_b": torch.zeros(64)}, "'blocks.7.self_attn.q.diff_b' matches nothing"),
    "module": ({"blocks.0.self_attn.x.alpha": torch.tensor(1.0)}, "'blocks.0.self_attn.x.alpha' matches nothing"),
    "ending": ({f"{Q}.lora_mid.weight": DOWN}, f"'{Q}.lora_mid.weight' matches nothing"),
    "prefix": ({f"other.{Q}.diff": DOWN}, f"'other.{Q}.diff' matches nothing"),
    "one factor": (
        {f"{Q}.lora_down.weight": None},
        f"'{Q}.lora_up.weight' is one of two LoRA factors, and the other factor is missing",
    ),
    "only alpha": (
        {"blocks.1.ffn.0.alpha": torch.tensor(1.0)},
        "'blocks.1.ffn.0.alpha' belongs to LoRA factors that are missing",
    ),
    "twice": ({"blocks.0.attn1.to_q.lora_A.weight": DOWN}, "is for the same weight as "),
    "difference": ({f"{Q}.diff": DOWN}, f"'{Q}.diff' has the shape [3, 64], not [64, 64]"),
    "8 bits": ({f"{Q}.lora_up.weight": UP.to(torch.float8_e4m3fn)}, "is stored as F8_E4M3: store it as F32"),
    "NaN": ({f"{Q}.lora_up.weight": UP * torch.nan}, f"tensor '{Q}.lora_up.weight' holds NaN or an infinity"),
    "infinity": ({f"{Q}.diff_b": torch.full([64], torch.inf)}, f"tensor '{Q}.diff_b' holds NaN or an infinity"),
    "alpha": ({f"{Q}.alpha": torch.tensor(torch.nan)}, f"tensor '{Q}.alpha' is not finite"),
    "alphas": ({f"{Q}.alpha": torch.ones(2)}, "alpha must be one number"),
    "DoRA": ({f"{Q}.dora_scale": torch.ones(64, 1)}, f"'{Q}.dora_scale' belongs to a DoRA: only LoRAs can be merged"),
    "DoRA of PEFT": ({f"{Q}.lora_magnitude_vector": torch.ones(64)}, "belongs to a DoRA"),
    "LoHa": ({f"{Q}.hada_w1_a": torch.ones(64, 1)}, "belongs to a LoHa"),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(8, 8)}, "belongs to a LoKr"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused_by_its_name(source: ModelFiles, tmp_path: Path, kind: str) -> None:
    changes, words = WRONG[kind]
    tensors = {key: tensor for key, tensor in {**GOOD, **changes}.items() if tensor is not None}
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    with pytest.raises(CorruptArtifactError) as caught:
        build(source, str(file))
    message = str(caught.value)
    print(message)
    assert words in message and str(file) in message and "\n" not in message


METADATA_THAT_FAIL = {"ss_network_alpha": "big"}, {"lora_adapter_metadata": "[1"}, {"lora_alpha": "nan"}


@pytest.mark.parametrize("metadata", METADATA_THAT_FAIL, ids=str)
def test_metadata_that_cannot_be_read_are_refused(
    source: ModelFiles, tmp_path: Path, metadata: dict[str, object]
) -> None:
    file = lora_files.write(tmp_path / "one.safetensors", GOOD, metadata)
    with pytest.raises(CorruptArtifactError, match=r"one.safetensors: its metadata: .*: download or make"):
        build(source, str(file))
    build(source, str(lora_files.write(tmp_path / "two.safetensors", {**GOOD, f"{Q}.alpha": torch.ones(1)}, metadata)))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x10" * 100])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one.safetensors").write_bytes(content)
    with pytest.raises(
        CorruptArtifactError, match=r"--lora .*one.safetensors: .*: it is damaged, or is not a safetensors"
    ):
        find_loras(ModelsConfig(lora=(str(tmp_path / "one.safetensors"),)), tmp_path)


@torch.no_grad()
def test_one_file_may_hold_both_experts(source: ModelFiles, tmp_path: Path) -> None:
    high, merged = low_rank(OF_BLOCKS, prefixed("transformer.", THEIRS), **A_AND_B)
    low, _ = low_rank(OF_BLOCKS, prefixed("transformer_2.", THEIRS), **A_AND_B)
    both = lora_files.write(tmp_path / "both.safetensors", high | low)
    assert worst(state(build(source, str(both))), added(source, (1.0, merged))) <= 1e-6
    only_low = lora_files.write(tmp_path / "second.safetensors", low)
    assert worst(state(build(source, str(only_low))), state(build(source))) == 0
    with pytest.raises(ConfigError, match=r"--lora-high-noise .*: its tensors belong to .*: use --lora-low-noise$"):
        find_loras(ModelsConfig(lora_high_noise=(str(only_low),)), tmp_path)


@pytest.mark.parametrize(
    ("option", "name", "fix"),
    [
        ("lora", "high_noise_model", "--lora-high-noise"),
        ("lora", "wan2.2_i2v_A14b_low_noise_lora_rank64", "--lora-low-noise"),
        ("lora_low_noise", "wan2.2-High-Noise", "--lora-high-noise"),
        ("lora_high_noise", "high_noise_model", None),
        ("lora", "slow_motion", None),
    ],
)
def test_a_file_that_is_named_for_one_expert(tmp_path: Path, option: str, name: str, fix: str | None) -> None:
    file = lora_files.write(tmp_path / f"{name}.safetensors", GOOD)
    named = ModelsConfig(**{option: (str(file),)})  # type: ignore[arg-type]
    if fix is None:
        assert len(find_loras(named, tmp_path)) == 1
    else:
        with pytest.raises(ConfigError, match=f"the file's name says that the LoRA is only for the .*: use {fix}, or"):
            find_loras(named, tmp_path)


IMAGE_TOWER = (
    "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight", "lora_unet_blocks_0_cross_attn_v_img.lora_up.weight",
    "diffusion_model.blocks.0.cross_attn.norm_k_img.diff", "diffusion_model.img_emb.proj.1.diff_b",
    "lora_unet_img_emb_proj_1.alpha", "transformer.blocks.0.attn2.add_k_proj.lora_A.weight",
    "transformer.condition_embedder.image_embedder.ff.net.0.proj.lora_B.weight",
)  # fmt: skip


@torch.no_grad()
def test_keys_of_the_image_tower_are_dropped(source: ModelFiles, tmp_path: Path) -> None:
    tower = {key: torch.full([2], torch.nan) for key in IMAGE_TOWER}
    file = lora_files.write(tmp_path / "one.safetensors", GOOD | tower)
    merged = {"blocks.0.self_attn.q.weight": product(DOWN, UP)}
    assert worst(state(build(source, str(file))), added(source, (1.0, merged))) <= 1e-6
    nothing = lora_files.write(tmp_path / "two.safetensors", tower)
    with pytest.raises(WanFastError, match="holds no tensor for this model"):
        build(source, str(nothing))


@pytest.mark.parametrize("kind", ["fp8-rowwise", "int8-weight-only", "2 ranks", "2 ranks, sharded", "offloaded"])
@torch.no_grad()
def test_other_loras_in_the_same_memory_are_bit_for_bit_a_fresh_load(
    source: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)
    (first, second), _ = two(tmp_path)
    scheme: Any = kind if kind in ("fp8-rowwise", "int8-weight-only") else None
    store = ArtifactStore(tmp_path)
    quantized = QuantizedExpert(store, source, "high_noise", scheme, "model") if scheme else None
    how: Any = {"quantized": quantized, "on_the_fly": scheme is not None, "device": "cpu"}

    def same(ranks: Ranks) -> list[bool]:
        def fresh(*loras: str) -> WanDiT:
            return build(source, *loras, ranks=ranks, precision="bf16", sharded="sharded" in kind, **how)

        held = [fresh(first), fresh()]
        places = {"high_noise": held[0], "low_noise": held[1]}
        experts = OffloadedExperts(places, "cpu") if kind == "offloaded" else ResidentExperts(places, "cpu")  # type: ignore[arg-type]
        found = []
        for loras in ((second,), (second, first), ()):
            if isinstance(experts, ResidentExperts):
                experts.evict(1 << 40)
            model, tensors = experts.writable("high_noise")
            merge = merge_of(find_loras(ModelsConfig(lora=loras), tmp_path), "high_noise", SPEC)
            refill_expert(model, tensors, source, "high_noise", ranks, merge=merge, **how)
            if isinstance(experts, ResidentExperts):
                experts.evict(1 << 40)
            got, wanted = state(experts.take("high_noise")[0]), state(fresh(*loras))
            found.append(all(torch.equal(got[name].float(), wanted[name].float()) for name in wanted))
            experts.release()
        others = state(experts.take("low_noise")[0]), state(fresh())
        return [*found, torch.equal(*(each["head.head.weight"] for each in others))]

    for found in on_ranks(Mesh(ulysses=2), same) if kind.startswith("2") else [same(Ranks("cpu"))]:
        assert found == [True] * 4
