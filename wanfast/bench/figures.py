"""Turns the results of cells into the rows of a report: seconds, forwards, memory, TFLOP/s and quality.

The seconds of a video are the sum of encoding the image, denoising and decoding. Loading the models and encoding the
text are not included: they belong to the start of a process, and the report has separate figures for this start. The
seconds of one repeat are the mean over the clips. The report states the median of the repeats and their spread (the
largest value minus the smallest). The number of forwards is the mean over the clips. The TFLOP/s of one rank are the
mean FLOP of a video, divided by the seconds of denoising and by the number of ranks. The memory is the largest peak of
all videos.
This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from wanfast.bench.apart import apart
from wanfast.bench.cells import ANOTHER_SEED, Bench, Cell, Cells, Row, hardware
from wanfast.bench.measure import Errors
from wanfast.bench.published import PUBLISHED_S
from wanfast.magcache_calib.clips import Clip
from wanfast.runtime.config.option import words
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import NeedsGpuError
from wanfast.runtime.facts.flop import bf16_peak, forward_flop
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.planning.past_runs import forwards_in_turn, fp8_share
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import magcache_json, plan_json
from wanfast.runtime.store.json_files import Document

STAGES = ("encode", "denoise", "decode")
RERUN, OTHER_SEED = "again, the same seed", "another seed"
_NOISE = (
    "The rows of the noise floor compare the first recipe with itself. The row of the same seed, which needs two "
    "repeats, makes the videos again in a new process. If these videos are identical, every finite PSNR in the table "
    "comes from a recipe, and not from chance. The row of another seed shows the PSNR of a different video. A recipe "
    "with such a low PSNR also makes a different video, which may be good or bad."
)


def report_of(bench: Bench, rows: list[Row], cells: Cells, errors: Errors) -> Document:
    """Returns the JSON document of a report: one row for each recipe, and what all rows share, such as the clips."""
    made = [_row(row, cells, errors) for row in rows]
    if not bench.files.spec.takes_images:
        made = [{**row, "published_s": None} for row in made]  # the published seconds are of the model that takes some
    base = made[0]
    for row in made:
        if row["video_s"] and base["video_s"]:
            row["ratio"] = round(row["video_s"]["median"] / base["video_s"]["median"], 4)
            row["ratio_unclear"] = row is not base and _is_unclear(row["video_s"], base["video_s"])
    left_out = bench.no_quality or ("" if base["status"] == "measured" else f"{base['recipe']} was not measured")
    floor = {} if left_out else _add_quality(bench, rows, made, cells)
    plans = next(row.plans for row in rows if row.plans)  # a video has the same size with each recipe
    config = plans[0].config
    here = hardware(config.ranks.device)
    used = f"{config.ranks.num_gpus} x {here['gpus'][0]}" if here["gpus"] else f"{here['cores']} CPU cores"
    return {
        "base": base["recipe"],
        "model": bench.files.spec.name,
        "machine": used,
        **{name: getattr(config.video, name) for name in ("size", "frames", "fps")},
        "steps": config.video.num_steps,
        "options": {name: value for name, value in bench.given.items() if name != "artifacts_dir"},
        "clips": [_shown(clip, plan) for clip, plan in zip(bench.clips, plans, strict=True)],
        "repeats": bench.repeats,
        "steps_measured": bench.steps_measured,
        "rows": made,
        "noise_floor": floor,
        "noise_floor_note": _NOISE if floor else None,
        "quality_left_out": left_out or None,
        "hardware": here | next((row["hardware"] for row in made if row["hardware"]), {}),
        "versions": versions(),
        "commit": commit(),
    }


def _shown(clip: Clip, plan: Plan) -> Document:
    """Returns the options of a clip, and the size of its videos; paths of images are reduced to file names."""
    paths = {"image", "last_image"}
    shown = {name: Path(value).name if name in paths else value for name, value in clip.options.items()}
    return {**shown, "video_size": f"{plan.geometry.width}x{plan.geometry.height}"}


def _row(row: Row, cells: Cells, errors: Errors) -> Document:
    error = row.error or errors.get(row.recipe)
    changes = plan_json(row.plans[0])["overridden"] if row.plans else {}
    document: Document = {
        "recipe": row.recipe,
        "status": "measured",
        "reason": None,
        "recipe_options": RECIPES[row.recipe].given(vars(row.plans[0].config.ranks)) if row.plans else None,
        "overridden": [word for change in changes.items() for word in words(*change)],
        "seconds": {},
        "video_s": None,
        "ratio": None,
        "ratio_unclear": None,
        "forwards": None,
        "peak_memory_bytes": None,
        "tflops": None,
        "peak_share": None,
        "estimated": None,
        "attention": None,
        "hardware": None,
        "start": None,
        "quality": None,
        "published_s": PUBLISHED_S.get(row.recipe),
        "cells": [cell.key for cell in row.cells],
    }
    if error:
        status = "needs CUDA" if isinstance(error, NeedsGpuError) else "failed" if row.opened else "not available"
        return document | {"status": status, "reason": str(error)}
    counted = [cell for cell in row.cells if not cell.is_other_seed]
    found = [(cell, cells.find(cell)) for cell in counted]
    return document | _figures(row.plans, [(cell, of_cell) for cell, of_cell in found if of_cell])


def _figures(plans: Sequence[Plan], found: list[tuple[Cell, Document]]) -> Document:
    """Returns the figures of a row whose cells are all measured."""
    by_repeat: dict[int, list[dict[str, float]]] = {}
    for cell, document in found:
        by_repeat.setdefault(cell.repeat, []).append(_seconds(plans[cell.clip], document))
    means = [{stage: fmean(one[stage] for one in of_clips) for stage in STAGES} for of_clips in by_repeat.values()]
    one = found[0][1]
    skips = [magcache_json(plan) or {"skipped_forwards": 0, "residual_bytes": 0} for plan in plans]
    computed = [plan.num_forwards - skip["skipped_forwards"] for plan, skip in zip(plans, skips, strict=True)]
    of_each = [forward_flop(plan.spec.dit, plan.geometry.tokens) for plan in plans]
    flop = fmean(number * each for number, each in zip(computed, of_each, strict=True))
    denoise_s = median(mean["denoise"] for mean in means)
    a_rank = flop / denoise_s / plans[0].mesh.group_size
    peak = bf16_peak(one["hardware"]["device"])
    estimated = _estimate(plans[0], one)
    held = max(skip["residual_bytes"] for skip in skips) if estimated else 0  # few steps skip nothing and hold none
    return {
        "seconds": {stage: _spread([mean[stage] for mean in means]) for stage in STAGES},
        "video_s": _spread([sum(mean.values()) for mean in means]),
        "forwards": {"computed": fmean(computed), "of": plans[0].num_forwards},
        "peak_memory_bytes": max(document["peak_memory_bytes"] for _, document in found) + held,
        "tflops": round(a_rank / 1e12, 3),
        "peak_share": peak and round(a_rank / peak, 4),
        "estimated": estimated,
        "attention": one["attention"]["kernel"],
        "hardware": one["hardware"],
        "start": _start([document for _, document in found]),
    }


def _seconds(plan: Plan, document: Document) -> dict[str, float]:
    """Returns the seconds of each stage; if few steps were measured, denoising is scaled to all forwards."""
    seconds = {stage: document["seconds"].get(stage, 0.0) for stage in STAGES}
    share = sum(forwards_in_turn(plan_json(plan))) / sum(forwards_in_turn(document["plan"]))
    return seconds | {"denoise": seconds["denoise"] * share}


def _estimate(plan: Plan, document: Document) -> str | None:
    """Returns how the seconds of denoising were estimated; None if the whole video was measured."""
    steps, of_all = sum(document["plan"]["steps"].values()), len(plan.schedule)
    measured, wanted = (sum(forwards_in_turn(of)) for of in (document["plan"], plan_json(plan)))
    if (steps, measured) == (of_all, wanted):
        return None
    in_fp8 = document["plan"]["fp8_attention"]
    first, end = in_fp8["steps"] if in_fp8 else (0, 0)
    mixed = f"; attention in float8: {end - first} of {steps} steps, {100 * fp8_share(plan):.0f} % of the whole video"
    return (
        f"denoising: {measured} forwards in {steps} steps were measured, times {wanted}/{measured} for {of_all} steps"
        f"{mixed if in_fp8 else ''}"
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 3),
        "spread": round(max(values) - min(values), 3),
        "of": len(values),
    }


def _is_unclear(seconds: dict[str, float], of_base: dict[str, float]) -> bool:
    """Returns whether two medians differ by less than the repeats of one of them differ from each other."""
    return abs(seconds["median"] - of_base["median"]) < max(seconds["spread"], of_base["spread"])


def _start(documents: list[Document]) -> Document:
    """Returns the seconds of the starts with their warm-up videos; no other figure includes these seconds."""
    starts = list({str(document["start"]): document["start"] for document in documents}.values())
    return {
        "seconds": _spread([start["seconds"] for start in starts]),
        "load_s": round(median(start["videos"][0]["seconds"].get("load", 0.0) for start in starts), 3),
        "warm_up_videos": len(starts[0]["videos"]),
    }


def _add_quality(bench: Bench, rows: list[Row], made: list[Document], cells: Cells) -> Document:
    """Adds the quality to each measured row, and returns the quality of the rows of the noise floor."""

    def files(row: Row, repeat: int, *, other: bool = False) -> list[str]:
        chosen = [cell for cell in row.cells if (cell.repeat, cell.is_other_seed) == (repeat, other)]
        return [str(cells.frames(cell)) for cell in sorted(chosen, key=lambda cell: cell.clip)]

    measured = [(row, of_row) for row, of_row in zip(rows, made, strict=True) if of_row["status"] == "measured"]
    videos = {row.recipe: files(row, 0) for row, _ in measured}
    floor = {OTHER_SEED: files(rows[0], 0, other=True)}
    if bench.repeats > 1:
        floor = {RERUN: files(rows[0], 1), **floor}
    found = apart(
        "compare",
        videos={**videos, **floor},
        base=rows[0].recipe,
        prompts=[clip.prompt for clip in bench.clips],
        is_judged=bench.files.spec.name == "tiny",
        device=measured[0][0].plans[0].config.ranks.device,
    )
    for row, of_row in measured:
        of_row["quality"] = found[row.recipe]
    return {name: found[name] for name in floor} | {"seed_added": ANOTHER_SEED}
