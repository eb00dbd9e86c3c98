"""Damages valid inputs in thousands of ways, the same in every run, and says what every outcome must be."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanfast.runtime.errors import WanFastError

T = TypeVar("T")


def counts(few: int, many: int = 10_000) -> pytest.MarkDecorator:
    """Returns the parameter `examples`: few in `make test`, many in `make test-long`."""
    long = pytest.param(many, marks=[pytest.mark.long, pytest.mark.timeout(7200)])
    return pytest.mark.parametrize("examples", [few, long])


def examine(strategy: st.SearchStrategy[T], check: Callable[[T], object], examples: int) -> None:
    """Runs `check` on so many values; it must return."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: T) -> None:
        check(value)

    run()


def damage(strategy: st.SearchStrategy[T], check: Callable[[T], object], examples: int) -> None:
    """Runs `check` on so many values; it returns, or raises a WanFastError of one line with an exit code."""

    def checked(value: T) -> None:
        try:
            check(value)
        except WanFastError as error:
            assert error.exit_code in (2, 3, 4) and "\n" not in str(error) and len(str(error)) < 2000, error

    examine(strategy, checked, examples)


def damaged(content: bytes, end: int | None = None) -> st.SearchStrategy[bytes]:
    """Returns contents with up to six pieces of a few bytes replaced, removed or added before `end`."""
    first = st.integers(0, len(content) if end is None else end)
    edits = st.tuples(first, st.integers(0, 9), st.binary(max_size=9))

    def edit(old: bytes, change: tuple[int, int, bytes]) -> bytes:
        at, removed, new = change
        return old[:at] + new + old[at + removed :]

    cut = st.integers(0, len(content)).map(lambda size: content[:size])
    many = st.lists(edits, min_size=1, max_size=6).map(lambda changes: functools.reduce(edit, changes, content))
    flipped = st.tuples(first, st.integers(0, 255)).map(
        lambda change: content[: change[0]] + bytes([change[1]]) + content[change[0] + 1 :]
    )
    return st.one_of(flipped, many, cut)


NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 10**30, 1e30, 1e-30]), st.floats(), st.booleans()
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


def changed(document: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Returns copies of a JSON document with one to three keys removed, renamed or with another value."""
    places = st.sampled_from(list(_places(document)))
    kinds = st.sampled_from(["value", "value", "value", "remove", "rename"])

    def change(edits: list[tuple[tuple[Any, ...], str, Any, str]]) -> dict[str, Any]:
        new = copy.deepcopy(document)
        for place, kind, value, name in edits:
            owner = _owner(new, place)
            if owner is None:
                continue
            if kind == "value":
                owner[place[-1]] = value
            else:
                old = owner.pop(place[-1])
                if kind == "rename" and isinstance(owner, dict):
                    owner[name] = old
        return new

    return st.lists(st.tuples(places, kinds, VALUES, st.text(max_size=8)), min_size=1, max_size=3).map(change)


def _places(document: Any, at: tuple[Any, ...] = ()) -> Any:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*at, key))


def _owner(document: Any, place: tuple[Any, ...]) -> Any:
    """Returns the object or list that holds a place, or None if an earlier change removed it."""
    for key in place[:-1]:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(document, dict):
        return document if place[-1] in document else None
    in_list = isinstance(document, list) and isinstance(place[-1], int) and place[-1] < len(document)
    return document if in_list else None
