"""Tests the order of tokens in bricks: an exact permutation of any grid, and compact blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanfast.runtime.models.bricks import RASTER, brick_order

SIDES = st.integers(1, 12)
GRIDS = st.tuples(st.integers(1, 9), SIDES, SIDES)
BRICKS = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


def places(
    grid: tuple[int, int, int], brick: tuple[int, int, int], *, has_last: bool = False
) -> list[tuple[int, int, int]]:
    """(t, y, x) of each token in brick order."""
    raster = list(itertools.product(*map(range, grid)))
    order = brick_order(grid, brick, has_last=has_last).order
    assert order is not None
    return [raster[index] for index in order.tolist()]


@given(GRIDS, BRICKS)
def test_the_order_is_a_permutation_and_is_undone_bit_for_bit(
    grid: tuple[int, int, int], brick: tuple[int, int, int]
) -> None:
    order = brick_order(grid, brick)
    assert sorted(places(grid, brick)) == list(itertools.product(*map(range, grid)))
    tokens = torch.randn(1, len(places(grid, brick)), 3)
    permuted = order.permute(tokens, 1)
    assert torch.equal(permuted[0], tokens[0][order.order])
    assert torch.equal(order.restore(permuted, 1), tokens)
    assert torch.equal(order.permute(order.restore(tokens, 1), 1), tokens)


@given(GRIDS, BRICKS)
def test_the_tokens_of_a_brick_follow_each_other(grid: tuple[int, int, int], brick: tuple[int, int, int]) -> None:
    frames, rows, columns = brick

    def brick_of(t: int, y: int, x: int) -> tuple[int, int, int]:
        first = 0 if t == 0 else 1 + (t - 1) // frames * frames
        own_frames = 1 if t == 0 else min(frames, grid[0] - first)
        return first, y // rows, x // (columns * frames // own_frames)

    bricks = [brick_of(*place) for place in places(grid, brick)]
    runs = [number for number, _ in itertools.groupby(bricks)]
    assert len(runs) == len(set(runs))
    assert [first for first, _, _ in runs] == sorted(first for first, _, _ in runs)


@given(GRIDS, BRICKS)
def test_the_first_frame_comes_first(grid: tuple[int, int, int], brick: tuple[int, int, int]) -> None:
    count = grid[1] * grid[2]
    assert {t for t, _, _ in places(grid, brick)[:count]} == {0}


@given(st.tuples(st.integers(2, 9), SIDES, SIDES), BRICKS)
def test_a_last_image_s_frame_comes_last(grid: tuple[int, int, int], brick: tuple[int, int, int]) -> None:
    """Before it, the order is that of a video without this frame. As for the first frame, its bricks are wide."""
    num_frames, rows, columns = grid
    found, inner = places(grid, brick, has_last=True), (num_frames - 1, rows, columns)
    last = found[-rows * columns :]
    assert found[: -rows * columns] == places(inner, brick)
    assert sorted(last) == list(itertools.product([num_frames - 1], range(rows), range(columns)))
    runs = [number for number, _ in itertools.groupby((y // brick[1], x // (brick[0] * brick[2])) for _, y, x in last)]
    assert len(runs) == len(set(runs))


def extents(found: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """(frames, rows, columns) that each block of 128 tokens spans."""
    blocks = [found[start : start + 128] for start in range(0, len(found), 128)]
    return [tuple(max(axis) - min(axis) + 1 for axis in zip(*block, strict=True)) for block in blocks]


@pytest.mark.parametrize(("grid", "most"), [((21, 45, 80), (4, 16, 48)), ((21, 30, 52), (4, 16, 32))], ids=str)
def test_the_blocks_of_a_large_video_are_compact(grid: tuple[int, int, int], most: tuple[int, int, int]) -> None:
    """A block spans bricks that touch; without turns at the edges, a block would span the width of the frame."""
    blocks = extents(places(grid, (2, 8, 8)))
    assert [block for block in blocks if any(size > limit for size, limit in zip(block, most, strict=True))] == []


def test_a_grid_of_whole_bricks_has_blocks_that_are_bricks() -> None:
    assert extents(places((6, 16, 32), (2, 8, 8))) == [(1, 8, 16)] * 4 + [(2, 8, 8)] * 16 + [(1, 8, 16)] * 4


def test_raster_order_returns_the_same_tensor() -> None:
    tokens = torch.randn(1, 5, 2)
    assert RASTER.permute(tokens, 1) is tokens and RASTER.restore(tokens, 1) is tokens
