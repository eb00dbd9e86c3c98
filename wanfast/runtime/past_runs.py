"""How long a plan will take, by what runs like it took here: seconds a forward, times the forwards. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanfast.runtime.artifacts import RESULTS
from wanfast.runtime.plan import Plan

# What a forward's time depends on; the attention kernel is known only once a run has begun.
_ALIKE = ("model", "width", "height", "frames", "precision", "quantize", "compile", "device", "mesh", "dit_fsdp")
_MOST_RUNS = 200


def predicted_seconds(plan: Plan) -> float | None:
    """Of denoising, by the newest run in the artifacts folder that was alike; None if there is none."""
    wanted = plan.to_json()
    for run in _newest(Path(plan.config.artifacts_dir) / "runs"):
        for result in _results(run):
            done = result["plan"]
            if all(done[name] == wanted[name] for name in _ALIKE):
                return round(float(result["seconds"]["denoise"]) * _computed(wanted) / _computed(done), 3)
    return None


def _computed(plan: dict[str, Any]) -> int:
    skipped = plan["magcache"]["skipped_forwards"] if plan.get("magcache") else 0
    return max(1, int(plan["forwards"]) - int(skipped))


def _newest(runs: Path) -> list[Path]:
    return sorted(runs.iterdir(), reverse=True)[:_MOST_RUNS] if runs.is_dir() else []


def _results(run: Path) -> Iterator[dict[str, Any]]:
    """The videos of a run; what is no result of ours is passed over."""
    for file in sorted((run / RESULTS).glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            complete = result["seconds"]["denoise"] > 0 and all(name in result["plan"] for name in _ALIKE)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if complete:
            yield result
