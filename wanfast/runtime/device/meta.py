"""Builds modules on the meta device, where parameters have names, shapes and dtypes, but no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Unfilled(TorchFunctionMode):
    """Skips initial values, because torch imports its compiler, for seconds, to fill a meta tensor with nothing."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Creates all tensors of the `with` block on the meta device, without initialising them."""
    with torch.device("meta"), _Unfilled():
        yield
