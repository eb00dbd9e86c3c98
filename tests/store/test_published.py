"""Tests that the published models are told apart by what the code looks at, and that each curve is of its model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from wanfast.runtime.facts.model_spec import A14B, PUBLISHED, ModelSpec, published_like
from wanfast.runtime.store import curves
from wanfast.runtime.store.model_files import ModelFiles

WITH_CURVES = {name: spec for name, spec in PUBLISHED.items() if curves._published_file(spec).exists()}


@pytest.mark.parametrize("spec", PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_model_is_found_by_its_facts(spec: ModelSpec) -> None:
    """Two models that these functions do not tell apart would get each other's defaults and curve."""
    assert published_like(spec.dit) is spec, "published_like returns another model: it compares too little"
    assert curves._published_with_sizes_of(spec) is spec, "the curve of another model is taken: compare more"


@pytest.mark.parametrize("spec", WITH_CURVES.values(), ids=WITH_CURVES)
def test_a_published_curve_is_of_its_model(spec: ModelSpec) -> None:
    curve = curves.published_curve(spec)
    facts = {"model": spec.name, "boundary": spec.boundary, "steps": spec.steps, "shift": spec.shift}
    assert {name: curve[name] for name in facts} == facts


def test_no_two_published_models_have_one_curve() -> None:
    assert {"a14b", "t2v-a14b"} <= WITH_CURVES.keys()
    for one, other in itertools.combinations(WITH_CURVES.values(), 2):
        assert curves.published_curve(one)["ratios"] != curves.published_curve(other)["ratios"]


def test_a_published_model_may_have_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles(tmp_path / "weights", "original", A14B, "", tmp_path)
    assert curves.preset(files) == curves.published_curve(A14B)
    monkeypatch.setattr(curves, "_PRESETS", tmp_path)
    assert curves.preset(files) is None
