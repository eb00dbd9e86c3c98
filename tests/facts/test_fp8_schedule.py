"""Tests which steps and layers are computed in float8, and which spans are refused."""

from __future__ import annotations

from typing import Any

import pytest

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.fp8_schedule import Fp8Schedule, parse_span


def schedule(**options: Any) -> Fp8Schedule:
    return Fp8Schedule.of(**{"num_steps": 40, "num_layers": 40, "head_dim": 128, **options})


@pytest.mark.parametrize(
    ("text", "span"),
    [("4:36", range(4, 36)), (" 0:1 ", range(1)), ("36:4", None), ("4:4", None), ("4", None), ("-1:4", None)],
)
def test_a_span_is_two_numbers(text: str, span: range | None) -> None:
    assert parse_span(text) == span


def test_by_default_an_eighth_at_either_end_is_exact() -> None:
    found = schedule()
    assert (found.steps, found.layers) == (range(5, 35), range(40))
    assert schedule(num_steps=3).steps == range(1, 2)
    with pytest.raises(
        ConfigError, match=r"of 2 steps, the first 1 and the last 1 would be exact.*add --fp8-steps 0:2"
    ):
        schedule(num_steps=2)
    for steps in (1, 2):
        short = schedule(num_steps=steps, may_be_empty=True)
        assert not short.steps and not any(short.is_fp8(step, 0) for step in range(steps))
        assert short.to_json()["steps"] == [0, 0]
    assert schedule(num_steps=3, may_be_empty=True).steps == range(1, 2)
    assert schedule(num_steps=2, may_be_empty=True, steps="0:2").steps == range(2)


def test_spans_decide() -> None:
    found = schedule(steps="4:36", layers="1:39")
    assert found.is_fp8(4, 1) and found.is_fp8(35, 38)
    assert not any(found.is_fp8(*call) for call in ((3, 1), (36, 1), (4, 0), (4, 39)))
    assert found.to_json() == {"steps": [4, 36], "layers": [1, 39], "hadamard": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": "4:41"}, "--fp8-steps 4:41: there are only 40 steps, counted from 0: use a second"),
        ({"layers": "4:41"}, "--fp8-layers 4:41: there are only 40 layers"),
        ({"hadamard": True, "head_dim": 20}, "--fp8-hadamard: this model's heads have 20 channels"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        schedule(**options)


def test_a_hadamard_matrix_is_used_where_one_is_known() -> None:
    assert schedule().hadamard and not schedule(head_dim=20).hadamard and not schedule(hadamard=False).hadamard
