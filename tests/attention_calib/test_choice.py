"""Tests how densities are chosen from the errors of all clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wanfast.attention_calib.choice import chosen, is_whole
from wanfast.runtime.facts.densities import LADDER


def clip(*heads: tuple[float, ...]) -> dict[str, Any]:
    """The measurements of one band and one layer."""
    return {"errors": [[[*map(list, heads)]]]}


FALLING = (0.5, 0.3, 0.2, 0.1, 0.05)


def test_the_least_density_that_keeps_the_target_in_every_clip_is_chosen() -> None:
    other = (0.5, 0.3, 0.22, 0.15, 0.1)
    found = chosen([clip(FALLING, FALLING), clip(FALLING, other)], 0.2, fp8=False)
    assert found["densities"] == [[[LADDER[2], LADDER[3]]]]
    assert found["errors"] == [[[list(FALLING), list(other)]]]
    assert found["largest_error"] == 0.2 and found["target_error"] == 0.2
    assert found["mean_error"] == pytest.approx((0.2 + 0.2 + 0.1 + 0.15) / 4)
    assert [rung["density"] for rung in found["ladder"]] == [*LADDER]
    assert found["ladder"][2]["mean_error"] == pytest.approx((3 * 0.2 + 0.22) / 4)


def test_a_head_that_no_density_keeps_exact_enough_is_dense() -> None:
    found = chosen([clip(FALLING, (0.9,) * 5)], 0.1, fp8=False)
    assert found["densities"] == [[[LADDER[3], None]]]
    assert found["mean_error"] == 0.05 and found["largest_error"] == 0.1  # the dense head has no error


def test_float8_is_chosen_if_no_cheaper_density_fits() -> None:
    """It costs what a list of three quarters costs, and no list must be made for it."""
    heads = [(*FALLING, 0.03), (0.9, 0.8, 0.7, 0.6, 0.05, 0.03), (0.9, 0.8, 0.7, 0.6, 0.05, 0.3), (0.9,) * 6]
    found = chosen([clip(*heads)], 0.1, fp8=True)
    assert found["densities"] == [[[0.5, "fp8", 0.75, None]]]
    assert [rung["density"] for rung in found["ladder"]] == [0.15, 0.25, 0.35, 0.5, "fp8", 0.75]
    assert found["errors"][0][0][1] == [0.9, 0.8, 0.7, 0.6, 0.03, 0.05]
    assert found["mean_error"] == pytest.approx((0.1 + 0.03 + 0.05) / 4)
    without = chosen([clip(*heads)], 0.1, fp8=False)
    assert without["densities"] == [[[0.5, 0.75, 0.75, None]]] and len(without["ladder"]) == 5


def test_a_plan_with_float8_needs_its_errors() -> None:
    six = clip((*FALLING, 0.03))
    assert is_whole(six, (1, 1, 1), fp8=True) and is_whole(six, (1, 1, 1), fp8=False)
    assert is_whole(clip(FALLING), (1, 1, 1), fp8=False) and not is_whole(clip(FALLING), (1, 1, 1), fp8=True)


def test_every_band_and_layer_chooses_for_itself() -> None:
    errors = np.full((3, 2, 4, 5), 0.9)
    for band, layer, head in np.ndindex(3, 2, 4):
        errors[band, layer, head, (band + layer + head) % 5 :] = 0.01
    found = chosen([{"errors": errors.tolist()}], 0.1, fp8=False)
    expected = [[[LADDER[(b + y + h) % 5] for h in range(4)] for y in range(2)] for b in range(3)]
    assert found["densities"] == expected


@pytest.mark.parametrize(
    "measured",
    [{}, {"errors": 3}, clip(FALLING), clip(FALLING, FALLING[:4]), clip(FALLING, (*FALLING[:4], float("nan")))],
    ids=str,
)
def test_incomplete_measurements_are_made_again(measured: dict[str, Any]) -> None:
    assert is_whole(clip(FALLING, FALLING), (1, 1, 2), fp8=False)
    assert not is_whole(measured, (1, 1, 2), fp8=False)
