"""Tests the gate of lossy attention, and that no recipe has lossy attention without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wanfast.quality.gate import gate
from wanfast.quality.tiny import share_of
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.facts.choices import LOSSY_ATTENTION

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks/results/tiny-attention.json").read_text())["rows"]


def row(right: int, ssim: float = 0.97, error: float | None = 0.05) -> dict[str, Any]:
    following = share_of([number < right for number in range(8)])
    return {"prompt_following": following, "ssim_dense": ssim, "mean_error": error}


@pytest.mark.parametrize(
    ("own", "unmet"),
    [
        (row(6), set()),
        (row(8), set()),  # more than with dense attention
        (row(4), set()),  # the interval of six of eight begins at 0.409
        (row(3), {"prompts"}),
        (row(6, ssim=0.95, error=0.1), set()),
        (row(6, ssim=0.9499), {"SSIM"}),
        (row(6, error=0.1001), {"error"}),
        (row(0, ssim=0.5, error=0.6), {"prompts", "SSIM", "error"}),
    ],
)
def test_a_way_must_meet_three_conditions(own: dict[str, Any], unmet: set[str]) -> None:
    met = gate(own, row(6, ssim=1.0, error=None))
    assert {name for name, is_met in met.items() if not is_met} == (unmet | {"holds"} if unmet else set())
    assert {*met} == {"prompts", "SSIM", "error", "holds"}


def test_the_table_has_the_gates_of_its_figures() -> None:
    dense, *others = ROWS
    assert dense["way"] == "dense" and dense["gate"] is None
    for lossy in others:
        assert lossy["gate"] == gate(lossy, dense), "run `make tiny-attention`"
    assert {lossy["asked_density"] for lossy in others if lossy["way"] == "uniform, guarded"} == {0.25, 0.35, 0.5, 0.75}


def may_have(name: str, options: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Returns whether the table allows a recipe's options. Float8 is judged with every call in float8."""
    if options.get("attention") not in LOSSY_ATTENTION:
        return True
    way = "fp8" if options["attention"] == "fa3-fp8" else "uniform, guarded"
    judged = [row for row in rows if (row["way"], row["asked_density"]) == (way, options.get("density"))]
    return name != "exact" and bool(judged) and all(row["gate"]["holds"] for row in judged)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_lossy_attention_only_if_the_gate_holds(name: str) -> None:
    assert may_have(name, dict(RECIPES[name].options), ROWS)


def test_the_rule_refuses_what_it_should() -> None:
    rows = [
        {"way": "fp8", "asked_density": None, "gate": {"holds": True}},
        {"way": "uniform", "asked_density": 0.5, "gate": {"holds": True}},
        {"way": "uniform, guarded", "asked_density": 0.5, "gate": {"holds": False}},
        {"way": "uniform, guarded", "asked_density": 0.75, "gate": {"holds": True}},
    ]
    in_fp8, sparse = {"attention": "fa3-fp8"}, {"attention": "sparse"}
    assert may_have("near-exact", in_fp8, rows) and may_have("near-exact", {**sparse, "density": 0.75}, rows)
    assert may_have("exact", {"attention": "fa3"}, rows) and may_have("exact", {}, rows)
    assert not may_have("exact", in_fp8, rows)
    assert not may_have("near-exact", in_fp8, rows[1:])  # not measured
    for density in (0.5, 0.6):
        assert not may_have("near-exact", {**sparse, "density": density}, rows)
    assert not may_have("near-exact", {**sparse, "attention_plan": "artifact"}, rows)  # of weights of one's own
