"""Tests the kernels of lossy attention on a Hopper GPU: against float64, against their emulations, and in a video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Outcome
from tests.models.test_attention_fp8 import quantized
from tests.models.test_block_sparse import formula, lists_of
from tests.parity import likeness, relative_error
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.models import attention_router, fused
from wanfast.runtime.models.attention_check import fp8_errors, sampled_errors
from wanfast.runtime.models.attention_fp8 import attention_in_fp8, emulated, fp8_attention
from wanfast.runtime.models.attention_kernels import KERNELS
from wanfast.runtime.models.attention_router import block_lists
from wanfast.runtime.models.block_sparse import block_sparse_attention, listed_attention
from wanfast.runtime.models.block_sparse import emulated as emulated_lists
from wanfast.runtime.models.rope import rotary_tables

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
needs_fa4 = pytest.mark.skipif(not KERNELS["fa4"].is_installed, reason="needs flash-attn-4")
needs_fa3 = pytest.mark.skipif(not KERNELS["fa3"].is_installed, reason="needs fa3-fwd")
Wanfast = Callable[..., Outcome]
GOOD = (
    "generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--device", "cuda",
    "--size", "192x192", "--frames", "17", "--steps", "4",
)  # fmt: skip


def drawn(length: int, heads: int = 3, queries: int | None = None) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, tokens, heads, 128) for tokens in (queries or length, length, length)]
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]


@needs_fa4
@pytest.mark.parametrize("length", [100, 128, 1280, 1301], ids=["one block", "one whole block", "whole", "ragged"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@torch.inference_mode()
def test_listed_blocks(length: int, share: float) -> None:
    """Lists of unequal lengths; a list of at least one block may lack the ragged one."""
    q, k, v = drawn(length)
    num_blocks = -(-length // 128)
    generator = torch.Generator("cuda").manual_seed(1)
    mask = torch.rand(1, 3, num_blocks, num_blocks, generator=generator, device="cuda") < share
    mask[..., 0] |= ~mask.any(-1)
    lists = lists_of(mask)
    out = block_sparse_attention(q, k, v, lists, 128)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape
    assert relative_error(out, formula(q, k, v, mask, 128)) <= 1e-2
    assert relative_error(out, emulated_lists(q, k, v, lists, 128).double()) <= 1e-2


@torch.inference_mode()
def test_the_router_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses the formula's blocks, except where two scores differ by a rounding, and needs 0.3 GB beside q and k.

    The lists themselves are 25 MB.
    """
    q, k, _ = drawn(75_600, heads=40)
    listed = [*range(60, 260, 5)]
    block_lists(q, k, 128, listed, 29, 29)  # compiles
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    lists = block_lists(q, k, 128, listed, 29, 29)
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    print(f"router and lists of one layer: {start.elapsed_time(end):.2f} ms, {peak / 1e6:.0f} MB")
    assert peak <= 0.35e9
    monkeypatch.setattr(attention_router, "_by_kernel", lambda x: False)
    expected = block_lists(q, k, 128, listed, 29, 29)
    assert torch.equal(lists.counts, expected.counts)
    numbers = torch.arange(591, device="cuda")
    same = []
    for head, length in enumerate(listed):
        ours, formulas = ((x.blocks[0, head, :, :length, None] == numbers).any(1) for x in (lists, expected))
        assert bool(ours.diagonal().all() and ours[:, :29].all() and ours[:, -29:].all())
        assert ours.sum(1).eq(length).all()
        same.append((ours & formulas).sum() / formulas.sum())
    assert float(torch.stack(same).min()) > 0.999


@pytest.mark.parametrize("length", [1280, 1301, 8192])
@torch.inference_mode()
def test_the_router_scores_as_float64(length: int) -> None:
    """Scores of random tokens differ by 0.008; an H200 had errors up to 4.7e-7, and the formula in float32 3.2e-7."""
    q, k, _ = drawn(length, heads=2)
    scores = attention_router.choice_scores(q, k, 128, 0, 0)
    for head in range(2):
        of_head = block_scores_in_float64(q[:, :, head], k[:, :, head])
        apart = ~torch.eye(scores.shape[-1], dtype=torch.bool, device="cuda")  # a block always lists itself
        assert float((scores[0, head] - of_head).abs()[apart].max()) < 1e-6


def block_scores_in_float64(q_BLD: Tensor, k_BLD: Tensor) -> Tensor:
    """Returns the scores [N, N] of blocks of 128 tokens by the router's formula."""
    q, k = (torch.stack([part.double().mean(0) for part in x[0].split(32)]) for x in (q_BLD, k_BLD))
    pairs = torch.exp(q @ k.T * 128**-0.5)
    quarters = [pairs.split(4)[n].sum(0) for n in range(-(-len(q) // 4))]
    return torch.stack([torch.stack([part.sum() for part in row.split(4)]) for row in quarters]).log()


@needs_fa4
def test_an_empty_list_is_refused() -> None:
    mask = torch.ones(1, 3, 4, 4, dtype=torch.bool, device="cuda")
    mask[0, 1, 2] = False
    with pytest.raises(ValueError, match="no block of keys"):
        block_sparse_attention(*drawn(512), lists_of(mask), 128)


@needs_fa4
@torch.inference_mode()
def test_the_host_does_not_wait_for_lists() -> None:
    """Neither where the router makes them nor where attention uses them."""
    q, k, v = drawn(512)
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            listed_attention(q, k, v, block_lists(q, k, 128, (1, 2, 3), 1), 128)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("hadamard", [True, False])
@torch.inference_mode()
def test_norm_rotation_and_rounding_in_one_pass(monkeypatch: pytest.MonkeyPatch, parts: int, hadamard: bool) -> None:
    """At the A14B's width. The kernel rounds to float16 before the Hadamard matrix, and sums in another order."""
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(1, 1000, 3 * 5120, generator=generator, device="cuda").bfloat16()
    scale, centre = torch.rand(40, device="cuda") + 0.02, torch.randn(40, 128, device="cuda")
    steps = {
        "norm": (torch.rand(5120, device="cuda") + 0.5, 1e-6),
        "rope": rotary_tables((10, 10, 10), 128, "cuda"),
        "hadamard": hadamard,
    }
    got = fused.heads_to_fp8(wide[..., 5120:10240], scale, centre, parts=parts, **steps)  # type: ignore[arg-type]
    monkeypatch.setattr(fused, "_by_kernel", lambda x: False)
    expected = fused.heads_to_fp8(wide[..., 5120:10240], scale, centre, parts=parts, **steps)  # type: ignore[arg-type]
    assert got.shape == expected.shape
    assert float((got.view(torch.uint8) == expected.view(torch.uint8)).double().mean()) > (0.99 if hadamard else 0.999)
    assert relative_error(got.float(), expected.double()) <= (1e-2 if hadamard else 2e-3)


@needs_fa3
@torch.inference_mode()
def test_attention_in_fp8() -> None:
    """The mean of v is taken out; with it, a long row loses much of an offset of all values."""
    q, k, v = drawn(40_000, heads=2, queries=256)
    for offset, centred, bounds in ((0, True, (0.02, 0.15)), (4, True, (1e-5, 0.01)), (4, False, (0.02, 0.5))):
        heads, centre = quantized(q, k, v + offset, centred=centred)
        exact = attention_probe._formula(q.double(), k.double(), (v + offset).double())
        error = relative_error(fp8_attention(heads, torch.bfloat16) + centre, exact)
        slow = relative_error(emulated(heads) + centre, exact)
        print(f"offset {offset}, {'centred' if centred else 'plain'}: {error:.4f}, the emulation {slow:.4f}")
        assert bounds[0] < error < bounds[1]


@needs_fa3
@torch.inference_mode()
def test_short_rows_equal_the_emulation() -> None:
    """P is rounded relative to another maximum in the kernel, so that it may round otherwise."""
    q, k, v = drawn(700)
    heads, _ = quantized(q, k, v, hadamard=True)
    assert relative_error(fp8_attention(heads, torch.bfloat16), emulated(heads)) <= 0.05


@needs_fa3
@torch.inference_mode()
def test_exact_heads_are_computed_in_float8() -> None:
    """As a plan of attention does: the heads are rounded after the exchange, and values have an offset."""
    q, k, v = drawn(3000, heads=5)
    v = v + 3
    out = attention_in_fp8(q, k, v)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, attention_probe._formula(q.double(), k.double(), v.double())) <= 0.01
    rows = torch.randint(3000, (5, 64), device="cuda")
    assert float(fp8_errors(q[0], k[0], v[0], rows).max()) <= 0.02


@torch.inference_mode()
def test_sampled_errors_are_those_of_float64() -> None:
    q, k, v = (x[0] for x in drawn(3000))
    exact = attention_probe._formula(*(x[None].double() for x in (q, k, v)))[0]
    out = (exact + 0.1 * torch.randn(exact.shape, device="cuda") * exact.std()).bfloat16()
    rows = torch.randint(3000, (3, 64), device="cuda")
    for head, error in enumerate(sampled_errors(q, k, v, out, rows)):
        wanted = exact[rows[head], head]
        assert float(error) == pytest.approx(relative_error(out[rows[head], head], wanted), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--attention", "sparse", "--density", "0.6", "--dense-layers", "0"), marks=needs_fa4),
        pytest.param(("--attention", "fa3-fp8", "--fp8-steps", "0:4"), marks=needs_fa3),
        pytest.param(("--attention", "fa3-fp8", "--fp8-steps", "0:4", "--compile"), marks=needs_fa3),
    ],
    ids=["sparse", "fp8", "fp8 compiled"],
)
def test_a_video(wanfast: Wanfast, workdir: Path, options: tuple[str, ...]) -> None:
    """The tiny model's heads have 128 channels, as the A14B's; a check changes nothing, and two ranks little."""

    def made(name: str, *more: str) -> dict[str, Any]:
        outcome = wanfast(*GOOD, *options, *more, "--output", f"{name}.mp4")
        assert outcome.exit_code == 0, outcome.err
        return json.loads((workdir / f"{name}.json").read_text())  # type: ignore[no-any-return]

    checked, plain = made("a", "--attention-check"), made("b")
    assert 1e-4 < checked["attention_check"]["mean"] < 1
    assert plain["output_sha256"] == checked["output_sha256"]
    if torch.cuda.device_count() > 1:
        shared = made("c", "--attention-check", "--num-gpus", "2", "--ulysses", "2")
        assert shared["attention_check"]["mean"] == pytest.approx(checked["attention_check"]["mean"], rel=0.1)
        assert likeness("c.mp4", "a.mp4") >= 30
