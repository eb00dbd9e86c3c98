"""Predicts how many seconds the denoising of a plan takes, from the seconds of a forward in a similar earlier run.

This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from wanfast.runtime.machine import gpus
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json, read_guided
from wanfast.runtime.store.artifacts import noting, replace_text, writing_to
from wanfast.runtime.store.sharing import locked

# The plan's fields on which a forward's time depends.
_ALIKE = (
    "model", "width", "height", "frames", "precision", "quantize", "compile", "device", "mesh", "dit_fsdp",
    "expert_offload",
)  # fmt: skip
_OF_ATTENTION = ("sparsity", "fp8_attention")  # which calls of lossy attention are lossy
_INDEX = "runs/past.jsonl"  # a row for each video that was made: its shape, and the seconds of a forward
_MOST = 500  # videos that the index keeps


def record(artifacts_dir: str, results: list[dict[str, Any]]) -> None:
    """Adds the finished videos of `results` to the index of past runs; prints a note if the index cannot be written."""
    done = [result for result in results if "error" not in result]
    entries = [_entry(result) for result in done if result["seconds"]["denoise"] > result["first_step_s"]]
    with noting():
        _append(Path(artifacts_dir) / _INDEX, entries)


def _entry(result: dict[str, Any]) -> dict[str, Any]:
    plan, turns = result["plan"], forwards_in_turn(result["plan"])
    later = sum(turns[1:])  # the first step is not counted, because it waited for compilers
    seconds = result["seconds"]["denoise"] - (result["first_step_s"] if later else 0)
    entry = {name: plan[name] for name in (*_ALIKE, "attention", *_OF_ATTENTION)}
    return entry | {"machine": result["hardware"]["device"], "seconds_a_forward": seconds / (later or turns[0])}


def _append(index: Path, entries: list[dict[str, Any]]) -> None:
    with writing_to(index), locked(index.with_suffix(".lock")):  # else a shortened index loses what others append
        if len(_entries(index)) >= 2 * _MOST:
            replace_text(index, "".join(json.dumps(entry) + "\n" for entry in _entries(index)[-_MOST:]))
        with index.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(entry) + "\n" for entry in entries))


def predicted_seconds(plan: Plan) -> float | None:
    """Returns the predicted seconds of denoising, or None if no similar run is found.

    The prediction uses the newest similar run in the artifacts folder. A similar run had the same model, size, frames,
    precision, quantization, compilation, attention, mesh and placement of the experts, and the same kind of GPU.
    """
    wanted = plan_json(plan)
    found = gpus.visible_gpus() if plan.config.ranks.device == "cuda" else []
    for entry in reversed(_entries(Path(plan.config.models.artifacts_dir) / _INDEX)):
        same_kernel = wanted["attention"] in ("auto", entry["attention"])
        same_machine = not found or found[0].name == entry["machine"]
        same_share = all(wanted[name] == entry.get(name) for name in _OF_ATTENTION)  # older entries have none
        if same_kernel and same_share and same_machine and all(entry[name] == wanted[name] for name in _ALIKE):
            return round(float(entry["seconds_a_forward"]) * sum(forwards_in_turn(wanted)), 3)
    return None


def _entries(index: Path) -> Sequence[dict[str, Any]]:
    """Returns the index's entries, the oldest first; none if there is no index."""
    try:
        facts = index.stat()
        return _read(index, facts.st_mtime_ns, facts.st_size)
    except OSError:
        return ()


@lru_cache(maxsize=2)
def _read(index: Path, mtime_ns: int, size: int) -> Sequence[dict[str, Any]]:
    """Reads the index once for all lines of a list; skips a row that is no complete entry."""
    entries = []
    for row in index.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(row)
        except (ValueError, RecursionError):
            continue
        is_whole = isinstance(entry, dict) and {*_ALIKE, "attention", "machine", "seconds_a_forward"} <= entry.keys()
        if is_whole and isinstance(entry["seconds_a_forward"], int | float):
            entries.append(entry)
    return entries


def forwards_in_turn(plan: dict[str, Any]) -> list[float]:
    """Returns how long each step takes, in units of one forward; the steps of the first clip come first.

    `plan`: the JSON of a plan. If no forward is skipped, the result holds one of these numbers for each step:

    * Without cfg parallelism: 2 for a step with guidance, and 1 for a step without guidance.
    * With cfg parallelism: 1 for a step with guidance, because both branches run at the same time. For a step without
      guidance, 0.5 if the plan lets all ranks share the forward, and 1 if half of the ranks run it.

    Skipped forwards take no time.
    """
    guided = read_guided(plan)
    skips = _skips(plan["magcache"]) if plan.get("magcache") else [(False, False)] * len(guided)
    combine = max if plan["mesh"]["cfg"] == 2 else sum
    unguided = plan["mesh"]["ulysses"] / plan["unguided_mesh"]["ulysses"] if plan.get("unguided_mesh") else 1
    of_a_clip: list[float] = [
        combine((not prompt, both and not negative_prompt)) * (1 if both else unguided)
        for both, (prompt, negative_prompt) in zip(guided, skips, strict=True)
    ]
    num_clips: int = plan.get("clips", 1)  # older runs have one
    return of_a_clip * num_clips


def fp8_share(plan: Plan) -> float:
    """Returns the share of a plan's computed forwards that have attention in float8; skipped ones do not count."""
    of_a_clip = forwards_in_turn(plan_json(plan))[: len(plan.schedule)]
    return sum(of_a_clip[step] for step in plan.fp8.steps) / sum(of_a_clip) if plan.fp8 else 0.0


def _skips(magcache: dict[str, Any]) -> list[tuple[bool, bool]]:
    """Returns the skips of each step and branch; older runs have other names for the skips."""
    names = ("skips_prompt", "skips_negative_prompt") if "skips_prompt" in magcache else ("skips_cond", "skips_uncond")
    return list(zip(*(magcache[name] for name in names), strict=True))
