"""Makes a function opaque to the compiler: a compiled block calls it as one operator, whose output's shape is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

TensorFn = Callable[..., Tensor]


def opaque(name: str, shape: TensorFn) -> Callable[[TensorFn], TensorFn]:
    """Returns a decorator for a function of tensors. `shape`: returns an empty output for the same arguments.

    Outside of graphs the function is called directly, because torch's operator imports the compiler at its first call.
    """

    def decorate(function: TensorFn) -> TensorFn:
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(shape)

        @wraps(function)
        def call(*tensors: object, **named: object) -> Tensor:
            return operator(*tensors, **named) if torch.compiler.is_compiling() else function(*tensors, **named)

        return call

    return decorate
