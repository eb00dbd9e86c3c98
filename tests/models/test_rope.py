"""Tests the rotary tables: the same bits as from each token's own angles, from few cosines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanfast.runtime.models.rope import RotaryTables, rotary_tables


class Computed(TorchDispatchMode):
    """Counts the cosines and sines that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in (torch.ops.aten.cos.default, torch.ops.aten.sin.default):
            self.count += arguments[0].numel()
        return function(*arguments, **(named or {}))


def of_each_token(grid: tuple[int, int, int], head_dim: int) -> RotaryTables:
    """The tables as the reference computes them: float64 angles of all tokens."""
    dim_yx = 2 * (head_dim // 6)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).unbind(1)
    angles = [
        torch.outer(position, 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        for position, dim in zip(positions, (head_dim - 2 * dim_yx, dim_yx, dim_yx), strict=True)
    ]
    of_tokens = torch.cat(angles, dim=1).unsqueeze(1)
    return RotaryTables(of_tokens.cos().float(), of_tokens.sin().float())


@pytest.mark.parametrize("head_dim", [4, 16, 24, 128])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 7), (21, 30, 52)], ids=str)
def test_an_axis_computes_each_position_once_and_the_bits_stay_the_same(
    grid: tuple[int, int, int], head_dim: int
) -> None:
    with Computed() as computed:
        tables = rotary_tables(grid, head_dim)
    for table, expected in zip(tables, of_each_token(grid, head_dim), strict=True):
        assert torch.equal(table, expected) and table.shape == expected.shape and table.is_contiguous()
    assert computed.count <= 2 * sum(grid) * (head_dim // 2)
