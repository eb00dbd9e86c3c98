"""Caches results that all videos of a list need, such as the machine's GPUs, while the list is planned.

    with asked_once():
        ...                   # a `remembered` function runs once for the same arguments

Outside such a block, every call runs the function again, because the result may have changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_answers: ContextVar[dict[Hashable, Any] | None] = ContextVar("answers", default=None)


@contextmanager
def asked_once() -> Iterator[None]:
    """Caches, until the `with` block ends, the results of functions that have the decorator `remembered`."""
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function cache its results within a `with asked_once()` block; errors are not cached."""

    @functools.wraps(function)
    def ask(*args: P.args, **named: P.kwargs) -> T:
        answers, key = _answers.get(), (function, args, tuple(sorted(named.items())))
        if answers is None:
            return function(*args, **named)
        if key not in answers:
            answers[key] = function(*args, **named)
        answer: T = answers[key]
        return answer

    return ask
