"""Tests the fused norms against float64, as formulas and as Triton kernels; without a GPU, Triton interprets them."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models import fused
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.models.tokens import LARGEST, QuantizedTokens

EPS = 1e-6
GRID, TOKENS = (2, 3, 4), 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 2.0**-8}  # bf16: one ulp, because the interpreter truncates


@pytest.fixture(params=["formula", "kernel"])
def norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "formula":
        monkeypatch.setattr(fused, "_by_kernel", lambda x: False)
        return fused
    kernels = importlib.import_module("wanfast.runtime.models.fused_kernels")
    monkeypatch.setattr(fused, "fused_kernels", kernels, raising=False)
    monkeypatch.setattr(fused, "_by_kernel", lambda x: True)
    return fused


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@torch.no_grad()
def test_a_stream_far_from_zero(norms: ModuleType) -> None:
    """A variance computed in one pass would lose its precision here."""
    x, y = 100 + normal(1, TOKENS, 160, seed=0), normal(1, TOKENS, 160, seed=1)
    weight, bias = normal(1, 1, 160, seed=2), normal(160, seed=3)
    total, out = norms.add_layer_norm(x, y, None, weight, bias, EPS, torch.float32)
    assert relative_error(out, exact_layer_norm(total, weight, bias)) <= 3e-5  # float32 itself holds 100 + x to 4e-6


@pytest.mark.parametrize("dim", [96, 5120])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_add_layer_norm(norms: ModuleType, dim: int, gated: bool, dtype: torch.dtype) -> None:
    x, y = normal(1, TOKENS, dim, seed=0), normal(1, TOKENS, dim, seed=1, dtype=dtype)
    gate, weight, bias = (normal(1, 1, dim, seed=seed) for seed in (2, 3, 4))
    before = x.clone()
    total, out = norms.add_layer_norm(x, y, gate if gated else None, weight, bias, EPS, dtype)
    expected = x.double() + (gate.double() if gated else 1) * y.double()
    assert torch.equal(x, before)
    assert total.dtype == torch.float32 and relative_error(total, expected) <= 1e-7
    assert out.dtype == dtype
    assert relative_error(out, exact_layer_norm(expected, weight, bias)) <= ROUNDING[dtype]


# float8 has 3 mantissa bits. GPUs round to the nearest value; Triton's interpreter truncates.
IN_8_BITS = {torch.int8: 0.02, torch.float8_e4m3fn: 0.04 if torch.cuda.is_available() else 0.085}


def check_quantized(tokens: QuantizedTokens, expected: Tensor, dtype: torch.dtype) -> None:
    assert isinstance(tokens, QuantizedTokens)
    assert tokens.values.dtype == dtype and tokens.scale.shape == expected.shape[:-1]
    assert relative_error(tokens.values.float() * tokens.scale.unsqueeze(-1), expected) <= IN_8_BITS[dtype]
    assert relative_error(tokens.scale * LARGEST[dtype], expected.abs().amax(-1)) <= 1e-5
    assert set(tokens.values.float().abs().amax(-1).flatten().tolist()) == {LARGEST[dtype]}


@pytest.mark.parametrize("dim", [96, 5120])
@pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
@torch.no_grad()
def test_norms_that_quantize(norms: ModuleType, dim: int, dtype: torch.dtype) -> None:
    x, y = normal(1, TOKENS, dim, seed=0), normal(1, TOKENS, dim, seed=1, dtype=torch.bfloat16)
    gate, weight, bias = (normal(1, 1, dim, seed=seed) for seed in (2, 3, 4))
    total, out = norms.add_layer_norm(x, y, gate, weight, bias, EPS, dtype)
    expected = x.double() + gate.double() * y.double()
    assert relative_error(total, expected) <= 1e-7
    check_quantized(out, exact_layer_norm(expected, weight, bias), dtype)


@pytest.mark.parametrize("dim", [96, 13824])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
@torch.no_grad()
def test_quantize_tokens(norms: ModuleType, dim: int, gelu: bool, dtype: torch.dtype) -> None:
    x = normal(1, TOKENS, dim, seed=0, dtype=torch.bfloat16)
    x[0, 3:] *= torch.arange(1, TOKENS - 2, device=DEVICE).unsqueeze(-1)  # each token has its own scale
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    check_quantized(norms.quantize_tokens(x, dtype, gelu=gelu), expected, dtype)
    nothing = norms.quantize_tokens(torch.zeros_like(x), dtype)
    assert not nothing.values.float().any() and (nothing.scale > 0).all()


def quantized_with(value: float, passes: ModuleType, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Tensor]:
    """Returns each pass's result [1, 8, 96] in float32 for an input with `value` as one number of token 5."""
    x, weight = normal(1, 8, 96, seed=0).to(device), normal(96, seed=1).to(device)
    x[0, 5, 7] = value
    quantized = {
        "norm": passes.add_layer_norm(torch.zeros_like(x), x, None, weight, weight, EPS, dtype)[1],
        "tokens": passes.quantize_tokens(x.bfloat16(), dtype),
        "gelu": passes.quantize_tokens(x.bfloat16(), dtype, gelu=True),
    }
    return {name: tokens.values.float() * tokens.scale.unsqueeze(-1) for name, tokens in quantized.items()}


def heads_with(value: float, passes: ModuleType, device: str = DEVICE) -> dict[str, Tensor]:
    """Returns the same of heads in float8, without and with a norm."""
    x, weight, scale = normal(1, 8, 96, seed=0), normal(96, seed=1).to(device), torch.ones(4, device=device)
    x[0, 5, 7] = value
    norms = {"heads": None, "normed heads": (weight, EPS)}
    found = {name: passes.heads_to_fp8(x.to(device), scale, norm=norm) for name, norm in norms.items()}
    return {name: heads[0].flatten(2).float() for name, heads in found.items()}


def check_only_token_5_is_lost(found: dict[str, Tensor]) -> None:
    for name, out in found.items():
        lost = (~out.isfinite()).any(-1)[0].nonzero().flatten().tolist()
        assert lost == [5], name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
@torch.no_grad()
def test_no_pass_hides_a_number_that_is_not_finite(norms: ModuleType, value: float, dtype: torch.dtype) -> None:
    """The watch over latents sees only what reaches them: a NaN that became the integer 0 does not."""
    check_only_token_5_is_lost(quantized_with(value, norms, dtype))


@torch.no_grad()
def test_no_head_in_fp8_hides_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the formula; a GPU tests the kernel, because Triton's interpreter cannot write NaN in float8."""
    monkeypatch.setattr(fused, "_by_kernel", lambda x: False)
    check_only_token_5_is_lost(heads_with(math.nan, fused))


@pytest.mark.parametrize(
    ("heads", "head_dim", "parts"), [(4, 24, 1), (4, 24, 2), (5, 32, 5), (40, 128, 1), (40, 128, 4)]
)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_rms_norm_heads(
    norms: ModuleType, heads: int, head_dim: int, parts: int, rotated: bool, dtype: torch.dtype
) -> None:
    dim = heads * head_dim
    wide = normal(1, TOKENS, 3 * dim, seed=0, dtype=dtype)
    x, weight = wide[..., dim : 2 * dim], normal(dim, seed=1)  # k, as a slice of the fused q, k, v product
    rope = rotary_tables(GRID, head_dim, DEVICE)
    out = norms.rms_norm_heads(x, weight, EPS, heads, rope if rotated else None, parts=parts)
    assert out.dtype == dtype and out.shape == (parts, 1, TOKENS, heads // parts, head_dim)
    assert out.is_contiguous()
    out = torch.cat(list(out), dim=2)

    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    exact = exact.unflatten(-1, (heads, head_dim))
    if rotated:
        turn = torch.complex(rope.cos.double(), rope.sin.double())
        pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)).contiguous()) * turn
        exact = torch.view_as_real(pairs).flatten(-2)
    assert relative_error(out, exact) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_linear_gelu(dtype: torch.dtype) -> None:
    x, weight, bias = (
        normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(1, TOKENS, 64), (96, 64), (96,)])
    )
    out = fused.linear_gelu(x, weight / 8, bias)
    product = x.double() @ (weight / 8).double().T + bias.double()
    expected = 0.5 * product * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (product + 0.044715 * product**3)))
    assert out.dtype == dtype
    assert relative_error(out, expected) <= {torch.float32: 5e-6, torch.bfloat16: 5e-3}[dtype]  # cuBLAS's tanh: 1.8e-6


def test_kernels_refuse_rows_that_do_not_lie_one_after_the_other() -> None:
    kernels = importlib.import_module("wanfast.runtime.models.fused_kernels")
    x, weight = normal(1, 16, TOKENS, seed=0).transpose(1, 2), normal(16, seed=1)
    for call in (
        lambda: kernels.add_layer_norm(x.contiguous(), x, None, weight, weight, EPS, torch.float32),
        lambda: kernels.rms_norm_rotate(x, weight, EPS, None, None, 1),
    ):
        with pytest.raises(AssertionError, match="must be"):
            call()


def test_formulas_are_taken_where_gradients_are_wanted() -> None:
    x = normal(1, 4, 8, seed=0)
    assert fused._by_kernel(x) is False
    with torch.no_grad():
        assert fused._by_kernel(x) is (DEVICE == "cuda")
        assert fused._by_kernel(torch.cat((x, x))) is False


@torch.no_grad()
def test_no_kernel_is_compiled_for_what_stands_around_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wanfast warmup`'s artifact holds only the blocks' kernels, so every process would compile others again."""
    monkeypatch.setattr(fused, "_by_kernel", lambda x: True)
    monkeypatch.setattr(fused, "fused_kernels", None, raising=False)
    spec = DiTSpec(dim=48, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16, text_dim=20, text_len=8)
    model = WanDiT(spec, torch.float32)
    randomise(model, seed=0)
    text = model.encode_text(normal(1, 5, 20, seed=1).cpu())
    inputs = [normal(1, channels, 2, 4, 4, seed=2).cpu() for channels in (16, 20)]
    with pytest.raises(AttributeError, match="add_layer_norm"):  # raised by the block
        model(*inputs, torch.tensor([500]), text, rotary_tables((2, 2, 2), 24, "cpu"))
    model.blocks = torch.nn.ModuleList()
    model(*inputs, torch.tensor([500]), [], rotary_tables((2, 2, 2), 24, "cpu"))


@torch.no_grad()
def test_operators_compute_what_the_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("wanfast.runtime.models.fused_kernels")
    names = ("wrap_triton", "add_layer_norm", "quantize_tokens", "rms_norm_rotate")
    bare = {name: getattr(kernels, name) for name in names}
    for name, function in bare.items():
        monkeypatch.setattr(kernels, name, function)  # so that they are bare again after this test
    x, weight = normal(1, TOKENS, 96, seed=0), normal(96, seed=1)
    expected = bare["rms_norm_rotate"](x, weight, EPS, None, None, 1), *bare["quantize_tokens"](x, torch.int8, True)
    kernels.make_operators()
    made = kernels.make_operators()  # of no effect
    assert made is None and not any(getattr(kernels, name) is bare[name] for name in names)
    found = (
        torch.ops.wanfast.rms_norm_rotate(x, weight, EPS, None, None, 1),
        *kernels.quantize_tokens(x, torch.int8, True),
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
