"""Makes a function opaque to torch.compile: the compiler calls it as one operator and does not trace into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

TensorFn = Callable[..., Tensor]


def opaque(name: str, shape: TensorFn) -> Callable[[TensorFn], TensorFn]:
    """Returns a decorator that registers a function of tensors as torch's operator `name`.

    `shape` takes the function's arguments, and returns an empty tensor with the shape and dtype of the function's
    output. Uncompiled code calls the function directly, because the first call of an operator imports the compiler.
    """

    def decorate(function: TensorFn) -> TensorFn:
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(shape)

        @wraps(function)
        def call(*tensors: object, **named: object) -> Tensor:
            return operator(*tensors, **named) if torch.compiler.is_compiling() else function(*tensors, **named)

        return call

    return decorate
