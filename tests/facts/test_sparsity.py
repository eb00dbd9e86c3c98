"""Tests the counts of blocks and lists, and what is refused because nothing would be sparse."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.densities import Densities, bands_of
from wanfast.runtime.facts.sparsity import BLOCK, Sparsity, assigned
from wanfast.runtime.models.attention_router import block_lists


def sparsity(grid: tuple[int, int, int] = (21, 45, 80), **options: Any) -> Sparsity:
    own = {"num_steps": 40, "dense_share": 0.25, "dense_layers": 1, "lists_every": 4}
    uniform = [options.pop(name, value) for name, value in (("density", 0.35), ("num_layers", 40), ("num_heads", 40))]
    return Sparsity.of(grid, **{**own, "densities": Densities.uniform(*uniform), **options})


def test_the_published_size() -> None:
    """75,600 tokens are 591 blocks; lists of all blocks would take 2.2 GB a branch."""
    found = sparsity()
    assert (found.num_blocks, found.first_blocks, found.longest, found.dense_steps) == (591, 29, 207, 10)
    assert 0.35 <= found.density < 0.352
    whole = sparsity(density=1.0, dense_layers=0)
    assert whole.longest == 591 and round(whole.list_bytes(1) / 1e9, 1) == 2.2


@pytest.mark.parametrize(
    ("grid", "density", "listed"),
    [((21, 45, 80), 0.01, 30), ((1, 8, 16), 0.1, 1), ((5, 8, 8), 0.1, 2), ((5, 8, 8), 1.0, 3), ((3, 16, 40), 1 / 3, 6)],
)
def test_a_list_holds_what_is_always_kept(grid: tuple[int, int, int], density: float, listed: int) -> None:
    assert sparsity(grid, density=density).longest == listed


@pytest.mark.parametrize(
    ("grid", "last", "listed"),
    [((21, 45, 80), 29, 59), ((5, 8, 16), 1, 3), ((5, 9, 9), 2, 4), ((2, 8, 16), 1, 2), ((2, 8, 8), 1, 1)],
)
def test_a_last_image_is_kept_like_the_first(grid: tuple[int, int, int], last: int, listed: int) -> None:
    """A block counts that holds tokens of the frame before, too."""
    found = sparsity(grid, density=0.01, has_last=True)
    assert (found.last_blocks, found.longest) == (last, listed)
    assert sparsity(grid).last_blocks == 0


@pytest.mark.parametrize(("share", "steps", "dense"), [(0, 4, 0), (0.25, 4, 1), (0.3, 10, 3), (0.26, 4, 2)])
def test_a_share_of_the_steps_is_rounded_up(share: float, steps: int, dense: int) -> None:
    found = sparsity(dense_share=share, num_steps=steps)
    assert found.dense_steps == dense
    assert [found.listed(step, 1) is None for step in range(steps)] == [step < dense for step in range(steps)]


def test_the_first_layers_are_dense_in_every_step() -> None:
    found = sparsity(dense_layers=2)
    assert [found.listed(39, layer) is None for layer in range(4)] == [True, True, False, False]


def test_the_mean_density_is_that_of_all_calls() -> None:
    found = sparsity(dense_share=0.5, num_steps=4, num_layers=5, dense_layers=2)
    forwards = [2, 1, 0, 2]
    calls = [
        1.0 if found.listed(step, layer) is None else found.density
        for step, number in enumerate(forwards)
        for layer in range(5)
        for _ in range(number)
    ]
    assert found.mean_density(forwards, [1] * 4) == pytest.approx(sum(calls) / len(calls))


def test_bytes_are_those_of_the_lists() -> None:
    found = sparsity((5, 8, 8), num_layers=3, num_heads=2)
    q, k = (torch.randn(1, 320, 2, 8) for _ in "qk")
    lists = block_lists(q, k, BLOCK, found.lengths[0][1] or (), found.first_blocks)
    assert found.list_bytes(1) == 2 * sum(part.numel() * part.element_size() for part in lists)  # two sparse layers


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


# Two bands, three layers and four heads; in the first band, the second layer is dense.
PLAN = Densities(
    bands=(0, 6),
    by_band=(
        ((0.35, 0.35, 0.35, 0.35), (None, None, None, None), (0.15, 0.35, 0.5, None)),
        ((0.35, 0.35, 0.35, 0.35), (0.15, 0.15, 0.15, 0.5), (0.75, 0.15, 0.15, 0.15)),
    ),
)


def test_each_head_has_the_density_of_its_band_and_layer() -> None:
    found = sparsity(densities=PLAN, num_steps=8)
    assert [found.band(step) for step in range(8)] == [0] * 6 + [1] * 2
    assert found.listed(1, 2) is None and found.listed(5, 0) is None and found.listed(5, 1) is None
    assert found.listed(5, 2) == (89, 207, 296, 591)  # beside sparse heads, a dense one lists all blocks
    assert found.listed(6, 1) == (89, 89, 89, 296)
    assert found.longest == 591


def test_the_mean_density_counts_heads_layers_and_steps() -> None:
    found = sparsity(densities=PLAN, num_steps=8)
    layer = {5: (1.0, 1.0, (89 + 207 + 296 + 591) / 4 / 591), 6: (1.0, (3 * 89 + 296) / 4 / 591, (444 + 267) / 4 / 591)}
    assert found.mean_density([0, 0, 0, 0, 0, 2, 1, 0], [1] * 8) == pytest.approx(
        (2 * sum(layer[5]) + sum(layer[6])) / 9
    )
    steps = [layer[5]] * 4 + [layer[6]] * 2  # the first two of eight are dense, and so is the first layer
    assert found.density == pytest.approx(sum(sum(each[1:]) for each in steps) / 12)
    bands = found.bands_json()
    assert [band["steps"] for band in bands] == [[0, 5], [6, 7]]
    assert bands[1]["layers"] == pytest.approx(list(layer[6]), abs=1e-4)
    assert bands[0]["layers"] == pytest.approx(list(layer[5]), abs=1e-4)


def test_lists_are_as_wide_as_the_densest_head_of_a_rank() -> None:
    """In the first band, one layer has lists; the second rank's are as wide as its dense head's."""
    found = sparsity(densities=PLAN, num_steps=8)
    one_layer, two_layers = 4 * 592, 4 * (297 + 445)
    assert found.list_bytes(1) == 591 * 4 * max(one_layer, two_layers)
    first, second = 2 * (90 + 445), 2 * (297 + 90)  # of the second band; the first has 2 * 208 and 2 * 592
    assert found.list_bytes(2) == 591 * 4 * max(first, second, 2 * 592)


@pytest.mark.parametrize(
    ("lengths", "ranks", "heads"),
    [
        ((5, 5, 5, 5), 2, ((0, 1), (2, 3))),
        ((9, 8, 2, 1), 2, ((0, 3), (1, 2))),
        ((9, 8, 2, 1), 1, ((0, 1, 2, 3),)),
        ((9, 8, 2, 1), 4, ((0,), (1,), (2,), (3,))),  # no order is better than their own
        ((6, 5, 5, 5, 4, 1), 3, ((0, 5), (1, 3), (2, 4))),
        ((9, 1, 1, 1, 1, 1), 2, ((0, 1, 2), (3, 4, 5))),  # each rank has three heads, whatever they cost
    ],
)
def test_ranks_get_heads_of_nearly_equal_work(
    lengths: tuple[int, ...], ranks: int, heads: tuple[tuple[int, ...], ...]
) -> None:
    assert assigned(lengths, ranks) == heads


def test_many_heads_of_a_ladder_are_balanced() -> None:
    draw = random.Random(0)
    for ranks, bound in ((2, 1.02), (4, 1.05), (8, 1.12)):
        for _ in range(50):
            lengths = tuple(draw.choice((89, 148, 207, 296, 444, 591)) for _ in range(40))
            heads = assigned(lengths, ranks)
            assert sorted(itertools.chain(*heads)) == [*range(40)] and {len(own) for own in heads} == {40 // ranks}
            assert max(sum(lengths[head] for head in own) for own in heads) <= bound * sum(lengths) / ranks


def test_the_slowest_rank_counts_as_the_cost() -> None:
    found = sparsity(densities=PLAN, num_steps=8)
    of_two = (1.0, (89 + 296) / 2 / 591, (444 + 89) / 2 / 591)  # of the second band's layers
    of_four = (1.0, 296 / 591, 444 / 591)
    assert found.mean_density([0] * 6 + [2, 1], [2] * 7 + [4]) == pytest.approx((2 * sum(of_two) + sum(of_four)) / 9)


def test_a_head_in_float8_has_no_lists_and_three_quarters_of_the_cost() -> None:
    plan = Densities(bands=(0, 4), by_band=((("fp8", 0.15, "fp8", None),), (("fp8",) * 4,)))
    found = sparsity(densities=plan, num_steps=8, dense_layers=0)
    assert found.has_fp8 and found.listed(3, 0) == (0, 89, 0, 591) and found.listed(4, 0) == (0, 0, 0, 0)
    of_first = (89 + 591 + 2 * 0.75 * 591) / 4 / 591
    assert found.mean_density([0, 0, 0, 1, 2, 0, 0, 0], [1] * 8) == pytest.approx((of_first + 2 * 0.75) / 3)
    assert found.assigned((0, 89, 0, 591), 2) == ((1, 3), (0, 2))
    assert found.list_bytes(1) == 591 * 4 * 2 * 592 and found.list_bytes(4) == 591 * 4 * 592
    assert [band["fp8_heads"] for band in found.bands_json()] == [2, 4]
    guarded = Densities(bands=(0, 4), by_band=((("fp8",) * 4,), ((0.5,) * 4,)))
    assert not sparsity(densities=guarded, num_steps=8, dense_layers=0, dense_share=0.5).has_fp8


def test_bands_that_are_guarded_have_no_lists() -> None:
    dense_first = Densities(bands=(0, 4), by_band=(((0.75, None),) * 2, ((0.15, 0.15),) * 2))
    found = sparsity(densities=dense_first, num_steps=8, dense_share=0.5, dense_layers=0)
    assert found.list_bytes(1) == 2 * 2 * 591 * 90 * 4
    assert sparsity(densities=dense_first, num_steps=8, dense_layers=0).list_bytes(1) == 2 * 2 * 591 * 592 * 4


def test_bands_halve_the_steps_of_each_expert() -> None:
    assert bands_of(["high_noise"] * 5 + ["low_noise"] * 4) == (0, 2, 5, 7)
    assert bands_of(["high_noise", "low_noise", "low_noise"]) == (0, 1, 2)
    assert bands_of(["low_noise"] * 6) == (0, 3)
