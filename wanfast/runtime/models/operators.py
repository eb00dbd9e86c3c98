"""Makes a function opaque to torch.compile: the compiler calls it as one operator and does not trace into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Fn = TypeVar("Fn", bound=Callable[..., Tensor | None])


def opaque(name: str, shape: Callable[..., Tensor | None], *, mutates: tuple[str, ...] = ()) -> Callable[[Fn], Fn]:
    """Returns a decorator that registers a function of tensors as a new operator of torch, with the name `name`.

    `shape` takes the function's arguments, and returns an empty tensor with the shape and dtype of the function's
    output. If the function has no output, `shape` returns None. `mutates` names the arguments into which the function
    writes.
    """

    def decorate(function: Fn) -> Fn:
        operator = torch.library.custom_op(name, function, mutates_args=mutates)
        operator.register_fake(shape)

        @wraps(function)
        def call(*given: Any, **named: Any) -> Tensor | None:
            # Uncompiled code does not call the operator, because the operator's first call imports the compiler.
            return operator(*given, **named) if torch.compiler.is_compiling() else function(*given, **named)

        return cast("Fn", call)

    return decorate
