"""Tests float8 attention against float64, and that its scales and centres do not depend on the number of ranks."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.models.test_fused import DEVICE, GRID, TOKENS, normal, norms
from tests.parity import relative_error
from wanfast.runtime.engine.attention_probe import _formula
from wanfast.runtime.models import attention_fp8
from wanfast.runtime.models.attention_fp8 import (
    Fp8Heads,
    Scaling,
    attention_in_fp8,
    fp8_attention,
    largest_norms,
    sampled_rows,
    scaling,
    statistics,
)
from wanfast.runtime.models.fused import heads_to_fp8
from wanfast.runtime.models.hadamard import hadamard_rotated
from wanfast.runtime.models.rope import apply_rotary, rotary_tables
from wanfast.runtime.models.tokens import FP8

__all__ = ["norms"]  # a fixture: the formulas, and the kernels by Triton's interpreter
EPS = 1e-6
EPSILON = 0.04 if torch.cuda.is_available() else 0.1  # Triton's interpreter halves values that round up to a power of 2


def test_a_hadamard_matrix_is_orthonormal_and_its_own_inverse() -> None:
    x = normal(5, 3, 128, seed=0)
    assert relative_error(hadamard_rotated(x).norm(dim=-1), x.double().norm(dim=-1)) <= 1e-6
    assert relative_error(hadamard_rotated(hadamard_rotated(x)), x.double()) <= 1e-6
    spread = hadamard_rotated(torch.nn.functional.one_hot(torch.tensor([3]), 128).float())
    assert torch.allclose(spread.abs(), torch.full((1, 128), 128**-0.5))


STEPS = ("all", "no hadamard", "centre only", "norm only", "hadamard only")
SIZES = ((4, 16, 1), (4, 16, 2), (5, 24, 5), (40, 128, 4))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(  # all pairs of two parameters, and half of the triples
    ("steps", "heads", "head_dim", "parts", "dtype"),
    [
        (steps, *size, DTYPES[(row + column) % 2])
        for row, steps in enumerate(STEPS)
        for column, size in enumerate(SIZES)
    ],
)
@torch.no_grad()
def test_heads_to_fp8(norms: ModuleType, heads: int, head_dim: int, parts: int, steps: str, dtype: torch.dtype) -> None:
    dim, powers = heads * head_dim, head_dim & (head_dim - 1) == 0
    x, weight = normal(1, TOKENS, 3 * dim, seed=0, dtype=dtype)[..., dim : 2 * dim], normal(dim, seed=1)
    rope = rotary_tables(GRID, head_dim, DEVICE) if steps in ("all", "no hadamard") else None
    centre = normal(heads, head_dim, seed=2) if steps not in ("norm only", "hadamard only") else None
    norm = (weight, EPS) if steps not in ("centre only", "hadamard only") else None
    hadamard = steps in ("all", "hadamard only") and powers
    scale = torch.linspace(0.02, 0.5, heads).to(DEVICE)
    out = norms.heads_to_fp8(x, scale, centre, norm=norm, rope=rope, hadamard=hadamard, parts=parts)
    assert out.dtype == FP8 and out.shape == (parts, 1, TOKENS, heads // parts, head_dim) and out.is_contiguous()

    exact = x.double()
    if norm:
        exact = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    exact = exact.unflatten(-1, (heads, head_dim))
    exact = apply_rotary(exact, rope) if rope else exact
    exact = exact - (0 if centre is None else centre.double())
    exact = hadamard_rotated(exact) if hadamard else exact
    got = torch.cat(list(out), dim=2).double() * scale[:, None]
    assert relative_error(got, exact.clamp(-448 * scale[:, None], 448 * scale[:, None])) <= EPSILON
    near = (got - exact).abs() <= exact.abs() / 16 + scale[:, None] / 1000  # float8 has 3 bits after the first
    assert near.double().mean((0, 1, 3)).min() > 0.9, "in some head"


@torch.no_grad()
def test_values_that_are_too_large_become_the_largest_number_and_nan_stays() -> None:
    """The scale of v follows from sampled tokens, so a value of another token may be too large for it."""
    x = normal(1, 3, 32, seed=0)
    x[0, 1, :2], x[0, 2, 5] = torch.tensor([1e6, -1e6]), torch.nan
    out = heads_to_fp8(x, torch.ones(2, device=DEVICE)).flatten(3)[0, 0].float()
    assert out[1, :2].tolist() == [448, -448] and int(out.isnan().sum()) == 1 and bool(out[2, 5].isnan())


def quantized(
    q: Tensor, k: Tensor, v: Tensor, *, centred: bool = True, hadamard: bool = False
) -> tuple[Fp8Heads, Tensor]:
    """Quantizes q, k and v [1, L, H, D] as a layer does whose norms have changed nothing; also returns v's constant."""
    heads = q.shape[2]
    bounds = torch.stack([x.float().norm(dim=-1).amax((0, 1)) for x in (q, k)])
    rows = sampled_rows(0, k.shape[1], k.shape[1])
    found = scaling(statistics(k[0, rows], v[0, rows].flatten(1))[None], bounds)
    if not centred:
        largest = v.float().abs().amax((0, 1, 3)) / 448
        zeros = torch.zeros_like(found.v_centre)
        found = Scaling(torch.stack((*found.scales[:2], largest)), zeros, zeros)
    q8, k8, v8 = (
        heads_to_fp8(x.flatten(2), scale, centre, hadamard=rotated)[0]
        for x, scale, centre, rotated in zip(
            (q, k, v), found.scales, (None, found.k_centre, found.v_centre), (hadamard, hadamard, False), strict=True
        )
    )
    assert q8.shape == (1, q.shape[1], heads, q.shape[3])
    return Fp8Heads(q8, k8, v8, found.scales), found.v_centre


def drawn(length: int, heads: int = 2, queries: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, heads, 128, generator=generator)
    return [q, *(torch.randn(1, length, heads, 128, generator=generator) for _ in "kv")]


def error(q: Tensor, k: Tensor, v: Tensor, **how: bool) -> float:
    heads, centre = quantized(q, k, v, **how)
    return relative_error(fp8_attention(heads, torch.float32) + centre, _formula(q.double(), k.double(), v.double()))


def test_the_mean_of_v_is_taken_out_and_added_again() -> None:
    """A long row with an offset of all values loses bits in a tensor core; measured on an H100: 0.228 and 0.007."""
    q, k, v = drawn(20_000)
    offset = v + 3
    assert error(q, k, offset, centred=False) > 0.04
    assert error(q, k, offset) < 2e-3
    assert error(q, k, v) < 0.06 and error(q, k, v, centred=False) < 0.06  # without an offset, both are much the same


def test_exact_heads_are_computed_in_float8() -> None:
    """With offsets of keys and values, one error of all heads; the channels allow a Hadamard matrix, or do not."""
    for channels in (128, 96):
        q, k, v = (x[..., :channels] for x in drawn(5000))
        k, v = k + 2, v + 3
        out = attention_in_fp8(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert out.dtype == torch.bfloat16 and out.shape == q.shape
        assert relative_error(out, _formula(*(x.bfloat16().double() for x in (q, k, v)))) < 4e-3


def test_the_mean_of_k_is_taken_out() -> None:
    q, k, v = drawn(500)
    offset = k + 30 * torch.randn(1, 1, 2, 128, generator=torch.Generator().manual_seed(1))
    assert error(q, offset, v, centred=False) > 0.5
    assert error(q, offset, v) < 0.15


def test_a_rotation_helps_against_scattered_large_values_only() -> None:
    """Large channels are better left alone: float8 is as precise for them, and a rotation spreads their rounding."""
    q, k, v = drawn(500)
    generator = torch.Generator().manual_seed(1)
    q10, k10 = (x * torch.where(torch.rand(x.shape, generator=generator) < 0.01, 10, 1) for x in (q, k))
    assert error(q10, k10, v, hadamard=True) < 0.7 * error(q10, k10, v)
    large = torch.ones(2, 128)
    large[0, 5] = large[1, 9] = 100
    assert error(q * large[0], k * large[1], v, hadamard=True) > 3 * error(q * large[0], k * large[1], v)


def test_the_emulation_equals_the_formula_if_nothing_is_rounded() -> None:
    """Ones and powers of two are exact in float8, and short rows lose no bits."""
    q, k = torch.zeros(1, 3, 2, 16), torch.zeros(1, 4, 2, 16)
    v = torch.arange(1.0, 9).reshape(1, 4, 2, 1).expand(1, 4, 2, 16)
    heads = Fp8Heads(*(x.to(FP8) for x in (q, k, v)), torch.tensor([[1.0, 1], [1, 1], [2, 4]]))
    expected = v.mean(1, keepdim=True) * torch.tensor([2.0, 4])[:, None]
    assert torch.equal(fp8_attention(heads, torch.float32), expected.expand(1, 3, 2, 16))


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_shares_have_the_scaling_of_the_whole(ranks: int) -> None:
    """Of 5,121 tokens, every second one is sampled; the last of five ranks holds fewer tokens."""
    tokens, heads = 5121, 2
    k, v = (normal(1, tokens, heads, 16, seed=seed, dtype=torch.bfloat16).cpu() for seed in (0, 1))
    v[0, 5000], v[0, 3000] = -20, 10  # the least and the largest values, of two ranks
    v[0, 3001] = 600  # not sampled
    bounds = largest_norms((torch.rand(32), torch.rand(32)), heads)

    def of(first: int, count: int) -> Tensor:
        rows, own = sampled_rows(first, count, tokens), slice(first, first + count)
        return statistics(k[0, own][rows], v[0, own][rows].flatten(1))

    share = -(-tokens // ranks)
    parts = [of(first, min(share, tokens - first)) for first in range(0, tokens, share)]
    nothing = statistics(k[0, :0], v[0, :0].flatten(1))  # of a rank that holds only padding
    whole = scaling(of(0, tokens)[None], bounds)
    shared = scaling(torch.stack((*parts, nothing)), bounds)
    assert all(torch.equal(one, other) for one, other in zip(whole, shared, strict=True))
    sampled = v[0, ::2].double().mean(0)
    assert relative_error(whole.v_centre, sampled) <= 1e-6
    largest = (v[0, ::2].double() - sampled).abs().amax((0, 2))
    assert relative_error(whole.scales[2] * 448, 64 * largest) <= 1e-6  # so the value that is not sampled fits, too


@torch.no_grad()
def test_no_query_or_key_is_larger_than_its_scale_allows() -> None:
    """Also if all of a token's size is in one channel of a head."""
    weight = torch.rand(64) + 0.1
    bounds = largest_norms((weight, weight), 4)
    x = torch.eye(64)[None] * 1000
    rows = heads_to_fp8(x, bounds[0] / 448, norm=(weight, 0.0))[0, 0].flatten(1)
    largest = rows.float().diagonal()
    assert relative_error(largest * bounds[0].repeat_interleave(16) / 448, 8 * weight.double()) <= EPSILON
    assert largest.max() == 448
    found = scaling(statistics(normal(64, 4, 16, seed=0).cpu(), x[0])[None], bounds)
    assert torch.allclose(found.scales[1], 2 * found.scales[0] * bounds[1] / bounds[0])


@pytest.mark.parametrize("package", ["fa3_fwd_interface", "flash_attn_interface"])
def test_flash_attention_gets_the_scales_by_head(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    seen: list[dict[str, object]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, **named: object) -> tuple[Tensor]:
        seen.append({"dtypes": {q.dtype, k.dtype, v.dtype}, **named})
        return (q.float(),)

    own = {"fa3_fwd_interface": "_flash_attn_forward", "flash_attn_interface": "flash_attn_func"}[package]
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{own: forward}))  # type: ignore[arg-type]
    monkeypatch.setattr(attention_fp8, "is_importable", lambda name: name == package)
    heads, _ = quantized(*drawn(9, queries=9))
    out = attention_fp8._by_fa3()(heads)
    assert torch.equal(out, heads.q.float())
    (call,) = seen
    for name, scale in zip("qkv", heads.scales, strict=True):
        given = call[f"{name}_descale"]
        assert isinstance(given, Tensor) and torch.equal(given, scale[None]) and given.is_contiguous()
    assert call["dtypes"] == {FP8}
