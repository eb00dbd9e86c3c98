"""Lets a list of videos ask each question once: which GPUs there are, where a model lies, how its tokenizer splits.

    with asked_once():
        ...                   # a `remembered` function answers from memory if its arguments were given before

Outside of such a block every question is asked again, because the answer may have changed.
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
    """Keeps the answers of `remembered` functions until the block ends."""
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function remember its answers within `asked_once`; errors are not remembered."""

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
