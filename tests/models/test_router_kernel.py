"""Tests that the router's kernel chooses the blocks of the formula; without a GPU, Triton interprets the kernel."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.models.test_block_sparse import qkv
from wanfast.runtime.models import attention_router
from wanfast.runtime.models.attention_router import block_lists, block_order, choice_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 8  # tokens; a tile of the kernel has 64 blocks


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes the router use its kernel, until `undo` is called; the interpreter runs once for equal inputs."""
    kernel = importlib.import_module("wanfast.runtime.models.router_kernel")
    scored: list[tuple[Tensor, Tensor, tuple[int, ...], Tensor]] = []

    def once(q: Tensor, k: Tensor, *numbers: int) -> Tensor:
        for known_q, known_k, known, scores in scored:
            if numbers == known and torch.equal(q, known_q) and torch.equal(k, known_k):
                return scores.clone()
        scored.append((q, k, numbers, kernel.choice_scores(q, k, *numbers)))
        return scored[-1][-1].clone()

    monkeypatch.setattr(attention_router, "router_kernel", SimpleNamespace(choice_scores=once), raising=False)
    monkeypatch.setattr(attention_router, "_by_kernel", lambda x: True)
    return monkeypatch


def drawn(length: int, head_dim: int = 8, heads: int = 3) -> list[Tensor]:
    return [2 * x.to(DEVICE, torch.bfloat16) for x in qkv(length, heads, head_dim=head_dim)[:2]]


@pytest.mark.parametrize(
    ("length", "head_dim", "first", "last"),
    [
        (1, 8, 0, 0),
        (8, 8, 1, 0),  # one block
        (61, 24, 2, 1),  # the last block lacks a quarter, and its last quarter a token
        (512, 128, 3, 0),  # a whole tile
        (513, 8, 3, 2),  # a tile's only block has one quarter
        (1101, 8, 5, 4),  # three tiles
    ],
)
@torch.inference_mode()
def test_scores_and_lists_are_those_of_the_formula(
    by_kernel: pytest.MonkeyPatch, length: int, head_dim: int, first: int, last: int
) -> None:
    """Also at ragged ends; the blocks of the first frame, of a last image and the diagonal are kept."""
    num_blocks = -(-length // BLOCK)
    listed = [min(first + last + more, num_blocks) for more in (1, 3, 9)]
    padded, k = drawn(length + 5, head_dim)[0], drawn(length, head_dim)[1]
    q = padded[:, :length]  # Ulysses' padding follows
    given = q, k, BLOCK, first, last
    scores, lists, order = choice_scores(*given), block_lists(q, k, BLOCK, listed, first, last), block_order(*given[:5])
    by_kernel.undo()
    expected = choice_scores(*given)
    kept = torch.eye(num_blocks, dtype=torch.bool, device=DEVICE)
    kept[:, :first] = kept[:, num_blocks - last :] = True
    assert scores.shape == (1, 3, num_blocks, num_blocks) and scores.dtype == torch.float32
    assert torch.equal(scores == torch.inf, kept.expand_as(scores))
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    formulas = block_lists(q, k, BLOCK, listed, first, last)
    assert torch.equal(lists.counts, formulas.counts) and torch.equal(lists.blocks, formulas.blocks)
    assert torch.equal(order, block_order(*given[:5]))


@pytest.mark.parametrize("way", ["kernel", "formula"])
@torch.inference_mode()
def test_of_equal_scores_the_smaller_number_is_chosen(by_kernel: pytest.MonkeyPatch, way: str) -> None:
    """In two tiles, so that the scores of equal keys come from two programs."""
    if way == "formula":
        by_kernel.undo()
    q, k = drawn(70 * BLOCK, heads=2)
    k = k[:, :1].expand(k.shape)
    counts, blocks = block_lists(q, k, BLOCK, (4, 6), 1, 1)
    order = block_order(q, k, BLOCK, 1, 1)
    assert counts[0, 0].tolist() == [4] * 70
    for number in range(70):
        kept = {0, 69, number}
        for head, length in enumerate((4, 6)):
            free = [block for block in range(70) if block not in kept]
            wanted = sorted([*kept, *free[: length - len(kept)]])
            assert blocks[0, head, number].tolist() == wanted + [0] * (6 - length)
            assert sorted(order[head, number].argsort()[:length].tolist()) == wanted


@torch.inference_mode()
def test_large_scores_do_not_overflow(by_kernel: pytest.MonkeyPatch) -> None:
    """The exponential of such scores is infinite in float32."""
    q, k = (40 * x for x in drawn(64))
    scores = choice_scores(q, k, BLOCK, 0, 0)
    by_kernel.undo()
    expected = choice_scores(q, k, BLOCK, 0, 0)
    off = ~torch.eye(8, dtype=torch.bool, device=DEVICE)
    assert expected[..., off].max() > 1000 and torch.allclose(scores, expected, rtol=1e-5)


def test_means_must_be_contiguous() -> None:
    kernel = importlib.import_module("wanfast.runtime.models.router_kernel")
    means = torch.zeros(1, 4, 2, 8, device=DEVICE).transpose(1, 2)
    with pytest.raises(AssertionError, match="means must be contiguous"):
        kernel.choice_scores(means, means.contiguous(), 4, 0, 0)


def test_a_cpu_takes_the_formula() -> None:
    assert attention_router._by_kernel(torch.zeros(1, device=DEVICE)) is (DEVICE == "cuda")
