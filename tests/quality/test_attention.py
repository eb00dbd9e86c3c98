"""Tests the quality and the errors of lossy attention on the tiny model, as `make tiny-attention` measures them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wanfast.attention_calib.choice import chosen
from wanfast.magcache_calib.clips import read_set, shipped_set
from wanfast.quality import attention, tiny
from wanfast.quality.gate import gate
from wanfast.runtime.facts.densities import Densities


@pytest.fixture(scope="module")
def judge() -> tiny.Judge:
    """Of videos with four blocks of 128 tokens, without guidance, so that a step is one forward."""
    return tiny.Judge(tiny.Settings("tiny", 2, 1.0, "bf16", side=224, frames=5))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SIDE", 224)
    monkeypatch.setattr(attention, "DENSITIES", (0.75,))


@pytest.mark.slow
def test_a_pair_in_every_way(judge: tiny.Judge, tmp_path: Path) -> None:
    clips = read_set(shipped_set(judge.files.spec), seed=0)
    all_ways = attention.ways(judge, [attention.measure(judge, clips[0])])
    results = [attention.judged(judge, (1, all_ways))]
    rows = attention.summarise(results, all_ways, judge)
    names = ["dense", "uniform", "calibrated", "uniform, guarded", "fp8", "fp8 with v's mean"]
    assert [row["way"] for row in rows] == names
    dense, uniform, calibrated, guarded, fp8, with_mean = rows
    assert (dense["psnr_dense"], dense["ssim_dense"], dense["mean_error"]) == (None, 1.0, None)
    assert uniform["density"] == 0.75 < guarded["density"] and 0.5 < calibrated["density"] <= 0.75
    assert [row["asked_density"] for row in rows] == [None, 0.75, 0.75, 0.75, None, None]
    assert dense["gate"] is None and [row["gate"] for row in rows[1:]] == [gate(row, dense) for row in rows[1:]]
    assert calibrated["against_uniform"]["pairs"] == 1 and calibrated["target_error"] > 0
    for row in (uniform, calibrated, guarded, fp8, with_mean):
        assert 20 < row["psnr_dense"] < 90 and 0.8 < row["ssim_dense"] < 1
        assert 0 < row["mean_error"] < row["largest_error"] < 1
    assert with_mean["mean_error"] != fp8["mean_error"] > 0.005  # rows are too short to show which is better
    attention.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_calibrated_plan_has_the_least_target_of_its_cost(judge: tiny.Judge) -> None:
    """In each band and layer, the first head needs more blocks than the second one."""
    of_head = [[0.8, 0.8, 0.8, 0.4, 0.2, 0.05], [0.4, 0.4, 0.4, 0.1, 0.05, 0.05]]
    errors = np.array(of_head) * np.linspace(1, 2, 15).reshape(3, 5, 1, 1)  # of bands, layers, heads and choices
    measured = [{"errors": errors.tolist()}]
    _, uniform, way, *_ = attention.ways(judge, measured)
    assert (way.kind, density_of(uniform, judge)) == ("calibrated", 0.75) and way.target_error is not None
    assert density_at(way.target_error, way, judge, measured) == density_of(way, judge) <= 0.75
    assert density_at(0.999 * way.target_error, way, judge, measured) > 0.75


def density_of(way: attention.AttentionWay, judge: tiny.Judge) -> float:
    sparsity = way.plan(judge, 0).sparsity
    assert sparsity is not None
    return sparsity.density


def density_at(target: float, way: attention.AttentionWay, judge: tiny.Judge, measured: list[dict[str, Any]]) -> float:
    assert way.densities is not None
    by_band = chosen(measured, target, fp8=False)["densities"]
    plan = Densities(bands=way.densities.bands, by_band=tuple(tuple(map(tuple, layers)) for layers in by_band))
    return density_of(dataclasses.replace(way, densities=plan), judge)
