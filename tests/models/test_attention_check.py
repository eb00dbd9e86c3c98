"""Tests that sampled errors are those of float64, and tell the error over all queries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from wanfast.runtime.engine import attention_probe
from wanfast.runtime.models.attention_check import errors_by_length, fp8_errors, sampled_errors
from wanfast.runtime.models.attention_fp8 import attention_in_fp8
from wanfast.runtime.models.attention_router import block_lists, block_order
from wanfast.runtime.models.block_sparse import block_sparse_attention


def drawn(length: int, heads: int, generator: torch.Generator) -> list[Tensor]:
    """q, k and v whose scores spread, and a sparse output."""
    q, k, v = (torch.randn(length, heads, 16, generator=generator) for _ in "qkv")
    q, k = q * 2, k + torch.randn(1, heads, 16, generator=generator)
    lists = block_lists(q[None], k[None], 16, [12] * heads, 1)
    return [q, k, v, block_sparse_attention(q[None], k[None], v[None], lists, 16)[0]]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_probe._formula(*(x[None].double() for x in (q, k, v)))[0]


def test_sampled_errors_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = drawn(300, 5, generator)
    rows = torch.randint(300, (5, 64), generator=generator)
    found = sampled_errors(q, k, v, out, rows)
    true = exact(q, k, v)
    for head in range(5):
        of_head = true[rows[head], head]
        expected = (out[rows[head], head].double() - of_head).norm() / of_head.norm()
        assert abs(float(found[head]) / float(expected) - 1) <= 1e-4
    assert float(sampled_errors(q, k, v, true.float(), rows).max()) <= 1e-6


def test_errors_in_float8_are_those_of_all_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, _ = drawn(300, 5, generator)
    rows = torch.randint(300, (5, 64), generator=generator)
    found, true = fp8_errors(q, k, v, rows), exact(q, k, v)
    out = attention_in_fp8(q[None], k[None], v[None])[0]
    for head in range(5):
        of_head = true[rows[head], head]
        expected = (out[rows[head], head].double() - of_head).norm() / of_head.norm()
        assert 0.01 < float(expected) < 0.1
        assert abs(float(found[head]) / float(expected) - 1) <= 0.1  # the limits are those of fewer queries


@pytest.mark.parametrize("ranks", [2, 3, 15])
def test_ranks_that_share_the_tokens_find_the_errors_of_one(ranks: int) -> None:
    """Of 196 tokens, the last of fifteen ranks holds none, and the last of three has padding."""
    generator = torch.Generator().manual_seed(0)
    tensors = drawn(196, 3, generator)
    rows = torch.randint(196, (3, 8), generator=generator)
    expected = sampled_errors(*tensors, rows)
    share = -(-196 // ranks)

    def of_rank(rank: int, stack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        own = slice(rank * share, (rank + 1) * share)
        q, k, v, out = (x[own] for x in tensors)
        q, out = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, share - len(x)), value=9.0) for x in (q, out))
        return sampled_errors(q, k, v, out, rows, min(rank * share, 196), stack)

    found = in_step([partial(of_rank, rank) for rank in range(ranks)])
    for errors in found:
        assert torch.allclose(errors, expected, rtol=1e-4)


def in_step(works: list[Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]]) -> list[torch.Tensor]:
    """Runs works that exchange tensors in threads; each gets a function that stacks the tensors of all."""
    barrier, held = threading.Barrier(len(works)), dict[int, torch.Tensor]()

    def run(number: int) -> torch.Tensor:
        def stack(x: torch.Tensor) -> torch.Tensor:
            held[number] = x
            barrier.wait(10)
            stacked = torch.stack([held[each] for each in range(len(works))])
            barrier.wait(10)
            return stacked

        return works[number](stack)

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(run, range(len(works))))


def test_64_queries_tell_the_error_of_all() -> None:
    """Within a fifth, for 95 % of 100 heads."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, out = drawn(384, 100, generator)
    found = sampled_errors(q, k, v, out, torch.randint(384, (100, 64), generator=generator))
    true = exact(q, k, v)
    whole = (out.double() - true).norm(dim=(0, 2)) / true.norm(dim=(0, 2))
    near = ((found / whole - 1).abs() <= 0.2).double().mean()
    assert float(whole.min()) > 0.01
    assert float(near) >= 0.95


def test_an_output_of_zeros_has_a_finite_error() -> None:
    q, k = (torch.ones(4, 1, 2) for _ in "qk")
    zeros = torch.zeros(4, 1, 2)
    assert sampled_errors(q, k, zeros, zeros, torch.zeros(1, 3, dtype=torch.int64)).tolist() == [0.0]


@pytest.mark.parametrize("length", [300, 41])
def test_errors_by_length_are_those_of_lists_of_this_length(length: int) -> None:
    """Also with a ragged last block; lists of all blocks have no error."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(length, 3, 16, generator=generator) * 2 for _ in "qkv")
    rows = torch.randint(length, (3, 64), generator=generator)
    num_blocks = -(-length // 16)
    order = block_order(q[None], k[None], 16, 1)
    assert order.shape == (3, num_blocks, num_blocks) and order.dtype == torch.int16
    lengths = (2, num_blocks // 2 + 1, num_blocks)
    found = errors_by_length(q, k, v, rows, order, 16, lengths)
    for column, listed in zip(found.T, lengths, strict=True):
        lists = block_lists(q[None], k[None], 16, [listed] * 3, 1)
        out = block_sparse_attention(q[None], k[None], v[None], lists, 16)[0]
        assert torch.allclose(column, sampled_errors(q, k, v, out, rows), rtol=1e-4, atol=1e-6)
    assert float(found[:, 0].min()) > 0.1 > 1e-5 > float(found[:, 2].max())
