"""Predicts how long a plan takes from similar earlier runs here: seconds a forward, times the forwards. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanfast.runtime.machine import gpus
from wanfast.runtime.planning.plan import Plan, guided_steps
from wanfast.runtime.store.artifacts import RESULTS

# The plan's fields on which a forward's time depends.
_ALIKE = (
    "model", "width", "height", "frames", "precision", "quantize", "compile", "device", "mesh", "dit_fsdp",
    "expert_offload",
)  # fmt: skip
_MOST_RUNS = 50


def predicted_seconds(plan: Plan) -> float | None:
    """Returns the seconds of denoising, by the newest similar run in the artifacts folder, or None without one.

    The first step of that run is not counted, because it waited for compilers.
    """
    wanted = plan.to_json()
    for result in _results(Path(plan.config.models.artifacts_dir) / "runs"):
        done = result["plan"]
        same_kernel = wanted["attention"] in ("auto", done["attention"])
        if same_kernel and all(done[name] == wanted[name] for name in _ALIKE) and _same_machine(result, plan):
            turns = forwards_in_turn(done)
            later = sum(turns[1:])
            seconds = result["seconds"]["denoise"] - (result["first_step_s"] if later else 0)
            return round(float(seconds) / (later or turns[0]) * sum(forwards_in_turn(wanted)), 3)
    return None


def _same_machine(result: dict[str, Any], plan: Plan) -> bool:
    found = gpus.visible_gpus() if plan.config.ranks.device == "cuda" else []
    return not found or bool(found[0].name == result["hardware"]["device"])


def forwards_in_turn(plan: dict[str, Any]) -> list[int]:
    """Returns the forwards of each step that run one after the other.

    With cfg parallelism the two branches of guidance run at the same time on different ranks.
    """
    guided = guided_steps(plan)
    skips = _skips(plan["magcache"]) if plan.get("magcache") else [(False, False)] * len(guided)
    combine = max if plan["mesh"]["cfg"] == 2 else sum
    return [
        combine((not prompt, both and not negative_prompt))
        for both, (prompt, negative_prompt) in zip(guided, skips, strict=True)
    ]


def _skips(magcache: dict[str, Any]) -> list[tuple[bool, bool]]:
    """Returns the skips of each step and branch; older runs have other names for the skips."""
    names = ("skips_prompt", "skips_negative_prompt") if "skips_prompt" in magcache else ("skips_cond", "skips_uncond")
    return list(zip(*(magcache[name] for name in names), strict=True))


def _results(runs: Path) -> Iterator[dict[str, Any]]:
    """Yields the results of the newest runs, the newest first, and skips a file that is no complete result."""
    newest = sorted(runs.iterdir(), reverse=True)[:_MOST_RUNS] if runs.is_dir() else []
    for file in (file for run in newest for file in sorted((run / RESULTS).glob("*.json"))):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            complete = result["seconds"]["denoise"] > result["first_step_s"] and "device" in result["hardware"]
            if complete and all(name in result["plan"] for name in _ALIKE):
                yield result
        except (OSError, ValueError, KeyError, TypeError):
            continue
