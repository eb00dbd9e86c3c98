"""Tests the counts of blocks and lists, and what is refused because nothing would be sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.sparsity import BLOCK, Sparsity
from wanfast.runtime.models.attention_router import block_lists


def sparsity(grid: tuple[int, int, int] = (21, 45, 80), **options: Any) -> Sparsity:
    own = {"density": 0.35, "num_steps": 40, "dense_share": 0.25, "num_layers": 40, "dense_layers": 1, "lists_every": 4}
    return Sparsity.of(grid, **{**own, **options})


def test_the_published_size() -> None:
    """75,600 tokens are 591 blocks; lists of all blocks would take 2.2 GB a branch."""
    found = sparsity()
    assert (found.num_blocks, found.first_blocks, found.listed, found.dense_steps) == (591, 29, 207, 10)
    assert 0.35 <= found.density < 0.352
    whole = sparsity(density=1.0, dense_layers=0)
    assert whole.listed == 591 and round(whole.list_bytes(40) / 1e9, 1) == 2.2


@pytest.mark.parametrize(
    ("grid", "density", "listed"),
    [((21, 45, 80), 0.01, 30), ((1, 8, 16), 0.1, 1), ((5, 8, 8), 0.1, 2), ((5, 8, 8), 1.0, 3), ((3, 16, 40), 1 / 3, 6)],
)
def test_a_list_holds_what_is_always_kept(grid: tuple[int, int, int], density: float, listed: int) -> None:
    assert sparsity(grid, density=density).listed == listed


@pytest.mark.parametrize(("share", "steps", "dense"), [(0, 4, 0), (0.25, 4, 1), (0.3, 10, 3), (0.26, 4, 2)])
def test_a_share_of_the_steps_is_rounded_up(share: float, steps: int, dense: int) -> None:
    found = sparsity(dense_share=share, num_steps=steps)
    assert found.dense_steps == dense
    assert [found.is_dense(step, 1) for step in range(steps)] == [step < dense for step in range(steps)]


def test_the_first_layers_are_dense_in_every_step() -> None:
    found = sparsity(dense_layers=2)
    assert [found.is_dense(39, layer) for layer in range(4)] == [True, True, False, False]


def test_the_mean_density_is_that_of_all_calls() -> None:
    found = sparsity(dense_share=0.5, num_steps=4, num_layers=5, dense_layers=2)
    forwards = [2, 1, 0, 2]
    calls = [
        1.0 if found.is_dense(step, layer) else found.density
        for step, number in enumerate(forwards)
        for layer in range(5)
        for _ in range(number)
    ]
    assert found.mean_density(forwards) == pytest.approx(sum(calls) / len(calls))


def test_bytes_are_those_of_the_lists() -> None:
    found = sparsity((5, 8, 8), num_layers=3)
    q, k = (torch.randn(1, 320, 2, 8) for _ in "qk")
    lists = block_lists(q, k, BLOCK, found.listed, found.first_blocks)
    assert found.list_bytes(2) == 2 * sum(part.numel() * part.element_size() for part in lists)  # two sparse layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dense_share": 0.9, "num_steps": 4}, "--dense-share 0.9: all 4 steps would use dense attention"),
        ({"dense_layers": 40}, "--dense-layers 40: all 40 layers would use dense attention"),
    ],
)
def test_nothing_sparse_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sparsity(**options)
