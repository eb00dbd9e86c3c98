"""Counts what is read of safetensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wanfast.runtime.weights.checkpoint import _SafetensorsReader

RowsFn = Callable[[_SafetensorsReader, str, int, int], Tensor]


def counting(found: list[int]) -> RowsFn:
    """The reader's `rows`, by which `found` grows by the bytes of every piece; to be put in its place."""
    rows = _SafetensorsReader.rows

    def counted(self: _SafetensorsReader, key: str, first: int, end: int) -> Tensor:
        piece = rows(self, key, first, end)
        found.append(piece.nbytes)
        return piece

    return counted
