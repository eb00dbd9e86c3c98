"""Counts the bytes that are read from safetensors files."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wanfast.runtime.weights.checkpoint import SafetensorsReader

RowsFn = Callable[[SafetensorsReader, str, int, int], Tensor]


def counting(found: list[int]) -> RowsFn:
    """Returns a replacement of the reader's `rows`, which adds the bytes of every piece to `found`."""
    rows = SafetensorsReader.rows

    def counted(self: SafetensorsReader, key: str, first: int, end: int) -> Tensor:
        piece = rows(self, key, first, end)
        found.append(piece.nbytes)
        return piece

    return counted
