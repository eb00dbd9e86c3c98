"""Stores a plan of attention in which all heads of the tiny model have a density of a half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanfast.runtime.facts.densities import bands_of
from wanfast.runtime.planning.completed import effective
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.attention_plans import KIND, PLAN, plan_inputs
from wanfast.runtime.store.curves import steps_of_video


def store_a_plan(video: dict[str, Any], artifacts: Path) -> str:
    """Stores a plan for the tiny model's run with the options `video`, and returns the plan's key."""
    given = {"model": "tiny", "device": "cpu", **video, "seed": 1, "attention": "sparse", "density": 0.5}
    files = model_files.locate("tiny", str(artifacts))
    config = effective(given, files)
    inputs = plan_inputs(config, files, "a set") | {"target_error": 0.1}
    bands = bands_of([expert for expert, _ in steps_of_video(config.video, files.spec.boundary)])
    errors = {"target_error": 0.1, "mean_error": 0.05, "largest_error": 0.1}
    document = {"bands": [*bands], "densities": [[[0.5, 0.5]] * 5] * len(bands), **errors}
    return ArtifactStore(artifacts).publish(KIND, inputs, lambda into: _write(into / PLAN, document)).folder.name


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document))
