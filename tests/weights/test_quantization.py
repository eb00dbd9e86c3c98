"""Tests quantized linears against the values that they represent, and experts quantized, stored and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from tests.compiling import compile_before
from tests.conftest import Outcome
from tests.on_ranks import on_ranks
from tests.one_expert import velocity, write_expert
from tests.parity import relative_error
from wanfast.runtime.config import QuantizeConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.jobs import quantize
from wanfast.runtime.models.dit import Linear, WanDiT
from wanfast.runtime.models.fused import quantize_tokens
from wanfast.runtime.models.quantized import PRODUCTS, QuantizedLinear, dequantize
from wanfast.runtime.models.tokens import QuantizedTokens
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.quantized import KEPT, QUANTIZED, QuantizedExpert
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.builders import build_expert
from wanfast.runtime.weights.experts import OffloadedExperts
from wanfast.runtime.weights.quantization import is_quantized, quantize_linears, scale_of
from wanfast.runtime.weights.quantization import quantize as quantize_weight

Wanfast = Callable[..., Outcome]
SCHEMES: tuple[Scheme, ...] = ("int8-weight-only", "int8-dynamic", "fp8-rowwise")
TORCHAO = {
    "int8-weight-only": Int8WeightOnlyConfig(set_inductor_config=False),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    "fp8-rowwise": Float8WeightOnlyConfig(set_inductor_config=False),
}
SPEC = DiTSpec(dim=64, ffn_dim=80, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, text_len=16)


def linear(scheme: Scheme, dtype: torch.dtype, *, gelu: bool = False) -> tuple[QuantizedLinear, nn.Linear]:
    """Returns a quantized linear and the linear that it represents."""
    torch.manual_seed(0)
    exact = nn.Linear(96, 40).requires_grad_(False)
    made = QuantizedLinear(scheme, 96, 40, dtype, gelu=gelu)
    made.weight.data, made.scale.data = quantize_weight(exact.weight.data, scheme)
    made.bias.data = exact.bias.data.to(dtype)
    return made, exact


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@torch.no_grad()
def test_a_shift_of_all_tokens_is_a_change_of_the_bias(scheme: Scheme | None) -> None:
    made, exact = linear(scheme or "int8-dynamic", torch.float32)
    if scheme is None:
        made = Linear(96, 40)
        made.load_state_dict(exact.state_dict())
    x, shift = torch.randn(2, 33, 96), 5 * torch.randn(96)
    change = made.of_shifted(x, shift) - made(x)
    weight = made.weight if scheme is None else dequantize(made.weight, made.scale)
    assert relative_error(change, (weight.double() @ shift.double()).expand_as(change)) <= 1e-6


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_products_are_those_of_the_values(scheme: Scheme, dtype: torch.dtype, gelu: bool) -> None:
    made, _ = linear(scheme, dtype, gelu=gelu)
    x = torch.randn(2, 33, 96).to(dtype)
    out = made(x)
    tokens = x.double()
    if scheme != "int8-weight-only":
        values, scale = quantize_tokens(x, PRODUCTS[scheme][0])
        tokens = values.double() * scale.double().unsqueeze(-1)
    expected = tokens @ dequantize(made.weight, made.scale).double().T + made.bias.double()
    if gelu:
        expected = nn.functional.gelu(expected, approximate="tanh")
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    if isinstance(out, QuantizedTokens):  # tokens for the layer after the activation
        assert gelu and out.values.dtype == made.weight.dtype
        made.gelu = False  # the product must meet the narrow bound
        before = made(x)
        assert (
            relative_error(quantize_tokens(before, made.weight.dtype, gelu=True).values.float(), out.values.float())
            == 0
        )
        out, bound = out.values.float() * out.scale.unsqueeze(-1), {torch.int8: 0.01}.get(out.values.dtype, 0.04)
    else:
        assert out.dtype == dtype
    assert out.shape == (2, 33, 40)
    assert relative_error(out, expected) <= bound


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_products_are_near_torchaos_and_near_the_exact_one(scheme: Scheme) -> None:
    made, exact = linear(scheme, torch.float32)
    x = torch.randn(33, 96)
    theirs = nn.Linear(96, 40).requires_grad_(False)
    theirs.load_state_dict(exact.state_dict())
    quantize_(theirs, TORCHAO[scheme])
    assert torch.equal(made.weight, theirs.weight.qdata)
    assert torch.equal(made.scale, theirs.weight.scale.flatten())
    errors = [relative_error(out, exact(x).double()) for out in (made(x), theirs(x))]
    print(f"{scheme}: relative error {errors[0]:.4f}, torchao's {errors[1]:.4f}")
    assert 1e-3 < errors[0] < {"int8-weight-only": 0.006, "int8-dynamic": 0.012, "fp8-rowwise": 0.05}[scheme]
    if scheme != "fp8-rowwise":  # torchao's fp8 quantizes no tokens on a CPU
        assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_are_quantized_by_their_largest_value(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [1e-3, 2e-3, -4e-3]])
    values, scale = quantize_tokens(x, dtype)
    largest = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
    assert values.float().abs().amax(-1).tolist() == [largest, 0, largest]
    assert relative_error(values.float() * scale.unsqueeze(1), x.double()) < {torch.int8: 4e-3}.get(dtype, 5e-2)
    assert values[1].float().tolist() == [0, 0, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_may_be_quantized_some_rows_at_a_time(scheme: Scheme) -> None:
    weight = torch.randn(40, 96)
    values, scale = quantize_weight(weight, scheme)
    parts = [quantize_weight(rows, scheme) for rows in weight.split(7)]
    assert torch.equal(values.float(), torch.cat([part for part, _ in parts]).float())
    assert torch.equal(scale, torch.cat([part for _, part in parts]))


def test_what_is_quantized_is_the_linears_of_the_blocks() -> None:
    with torch.device("meta"):
        model = WanDiT(SPEC)
        quantize_linears(model, "int8-dynamic", torch.bfloat16)
    eight_bits = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
    assert eight_bits == {f"blocks.{block}.{linear}.weight" for block in range(3) for linear in QUANTIZED}
    assert all(is_quantized(name) for name in eight_bits)
    kept = {name for name in model.state_dict() if name not in eight_bits and not name.endswith("scale")}
    assert not any(map(is_quantized, kept))
    assert memory.expert_bytes(SPEC, "bf16", "int8-dynamic") == sum(p.nbytes for p in model.parameters())
    assert memory.expert_bytes(A14B.dit, "bf16", "fp8-rowwise") < 0.52 * memory.expert_bytes(A14B.dit, "bf16")


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_norms_and_the_activation_quantize_for_the_products_after_them(
    source: model_files.ModelFiles, scheme: Scheme, tmp_path: Path
) -> None:
    expert, _ = make(source, scheme, tmp_path / "store")
    model = build_expert(source, "high_noise", "bf16", Ranks("cpu"), quantized=expert)
    read: dict[str, type] = {}
    for name, module in model.blocks[1].named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(lambda _, given, name=name: read.update({name: type(given[0])}))
    velocity(model)
    in_8_bits = {"self_attn.qkv", "cross_attn.q", "ffn.0", "ffn.2"}
    assert read.keys() == in_8_bits | {"self_attn.o", "cross_attn.k", "cross_attn.v", "cross_attn.o"}
    assert {name for name, kind in read.items() if kind is QuantizedTokens} == (
        set() if scheme == "int8-weight-only" else in_8_bits
    )


def test_every_parameter_is_quantized_or_named_as_kept() -> None:
    with torch.device("meta"):
        names = list(WanDiT(SPEC).state_dict())
    for name in names:
        kinds = [kind for kind in KEPT if kind.removesuffix("s") in name]
        assert is_quantized(name) != bool(kinds), f"{name}: {kinds}"
    assert all(any(kind.removesuffix("s") in name for name in names) for kind in KEPT)


@pytest.fixture
def source(tmp_path: Path) -> model_files.ModelFiles:
    return write_expert(tmp_path / "source", SPEC)


def make(source: model_files.ModelFiles, scheme: Scheme, store: Path) -> tuple[QuantizedExpert, dict[str, Any]]:
    config = QuantizeConfig(
        model=str(source.root), scheme=scheme, expert="high", device="cpu", artifacts_dir=str(store)
    )
    (result,) = quantize.run(config)
    return QuantizedExpert(ArtifactStore(store), source, "high_noise", scheme, str(source.root)), result


@pytest.mark.parametrize("scheme", [*SCHEMES, "bf16"])
@torch.no_grad()
def test_stored_and_loaded_is_bit_for_bit_what_is_quantized_while_loading(
    source: model_files.ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    monkeypatch.setattr(quantize, "SHARD_BYTES", 40_000)  # several shards
    monkeypatch.setattr(quantize, "_CHUNK_VALUES", 64 * 7)  # weights in pieces
    expert, result = make(source, scheme, tmp_path / "store")
    assert len(list(Path(result["output"]).glob("*.safetensors"))) > 2

    def build(ranks: Ranks, on_the_fly: bool) -> Tensor:
        quantized = None if scheme == "bf16" and on_the_fly else expert
        fly = on_the_fly and quantized is not None
        return velocity(build_expert(source, "high_noise", "bf16", ranks, quantized=quantized, on_the_fly=fly))

    kept = build(Ranks("cpu"), on_the_fly=False)
    assert torch.equal(build(Ranks("cpu"), on_the_fly=True), kept)
    exact = velocity(build_expert(source, "high_noise", "fp32", Ranks("cpu")))
    error = relative_error(kept, exact.double())
    print(f"{scheme}: relative error of the velocity {error:.4f}")
    assert 1e-4 < error < {"bf16": 0.02, "fp8-rowwise": 0.2}.get(scheme, 0.06)
    monkeypatch.setattr(checkpoint, "_WORTH_SHARING", 1)  # small weights are shared too
    for both in on_ranks(Mesh(ulysses=2), lambda ranks: [build(ranks, on_the_fly) for on_the_fly in (False, True)]):
        for got in both:
            assert relative_error(got, kept.double()) <= (2e-2 if scheme != "bf16" else 5e-3)


def test_of_what_is_stored_only_its_own_bytes_are_read(
    source: model_files.ModelFiles, tmp_path: Path, bytes_read: list[int]
) -> None:
    expert, _ = make(source, "int8-dynamic", tmp_path / "store")
    bytes_read.clear()
    model = build_expert(source, "high_noise", "bf16", Ranks("cpu"), quantized=expert)
    assert (
        sum(bytes_read)
        == memory.expert_bytes(SPEC, "bf16", "int8-dynamic")
        == sum(p.nbytes for p in model.parameters())
    )


@torch.no_grad()
def test_quantized_experts_are_offloaded_like_others(source: model_files.ModelFiles, tmp_path: Path) -> None:
    expert, _ = make(source, "fp8-rowwise", tmp_path / "store")

    def build() -> WanDiT:
        return build_expert(source, "high_noise", "bf16", Ranks("cpu"), quantized=expert)

    high, low = build(), build()
    for parameter in low.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    expected = {"high_noise": velocity(high), "low_noise": velocity(low)}
    offloaded = OffloadedExperts({"high_noise": high, "low_noise": low}, "cpu")
    for name in ("high_noise", "low_noise", "high_noise"):
        model, _ = offloaded.take(name)
        assert torch.equal(velocity(model), expected[name])


@pytest.mark.parametrize(("scheme", "ranks"), [("int8-weight-only", 1), ("int8-dynamic", 2), ("fp8-rowwise", 1)])
def test_a_block_stays_one_graph(scheme: Scheme, ranks: int) -> None:
    """The block is one graph on one rank and on two, with 8-bit weights."""

    def compiled(ranks: Ranks) -> Tensor:
        with torch.device("meta"):
            model = WanDiT(SPEC, torch.bfloat16, ranks.sequence)
            quantize_linears(model, scheme, torch.bfloat16)
        model.to_empty(device="cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scaled = values * 40 if is_quantized(name) else values / (2000 if name.endswith("scale") else 8)
            parameter.data.copy_(scaled)
        model.fuse_projections()
        eager = velocity(model)
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            return torch.stack((velocity(model), eager))

    compile_before()
    with torch.no_grad():
        for got, eager in [compiled(Ranks("cpu"))] if ranks == 1 else on_ranks(Mesh(ulysses=ranks), compiled):
            assert torch.isfinite(got).all() and relative_error(got, eager.double()) <= 1e-3


def test_the_manifest_and_the_errors_say_what_was_done(
    source: model_files.ModelFiles, tmp_path: Path, figures: list[Any]
) -> None:
    expert, result = make(source, "fp8-rowwise", tmp_path / "store")
    folder = Path(result["output"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"]["quantized"] == list(QUANTIZED) and "head" in manifest["inputs"]["kept"]
    assert manifest["inputs"]["torchao"] == manifest["versions"]["torchao"]
    errors = json.loads((folder / "errors.json").read_text())
    assert len(errors["tensors"]) == 3 * len(QUANTIZED) and len(errors["worst"]) == 10
    assert list(errors["worst"].values()) == sorted(errors["tensors"].values(), reverse=True)[:10]
    assert (folder / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert all(block == int(block) for block in figures[0].axes[0].get_xticks())
    with torch.device("meta"):
        wanted = WanDiT(SPEC, torch.float32).state_dict()
    exact = {name: rows(0, len(wanted[name])) for name, rows in checkpoint.stream(
        WanDiT(SPEC, torch.float32), checkpoint.Source(source.weights("high_noise"), "dit", "original")
    )}  # fmt: skip
    name = next(iter(errors["worst"]))
    values, scale = quantize_weight(exact[name], "fp8-rowwise")
    assert errors["tensors"][name] == pytest.approx(relative_error(dequantize(values, scale), exact[name].double()))
    assert scale_of(name) in json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]
    again = make(source, "fp8-rowwise", tmp_path / "store")[1]
    assert again["was_there"] and again["output"] == result["output"]
    assert expert.find() == folder
