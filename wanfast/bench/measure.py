"""Measures the missing cells of `wanfast bench`: the first repeat of every recipe, then the second, and so on.

For each repeat, a recipe starts new ranks, and the ranks load the models. Then the ranks make a short warm-up video of
each clip, because the first video of a shape also compiles code, searches for the fastest kernels and encodes the
prompt. The seconds of a measured video include neither the loading nor the warm-up; the report has a column for them.
If a recipe fails, the other recipes still run.
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from wanfast.bench.cells import Bench, Cell, Cells, Row, SayFn
from wanfast.runtime.errors import WanFastError
from wanfast.runtime.processes.handle import Handle, Video

Errors = dict[str, WanFastError]  # recipe -> why its measurement failed


def missing(rows: list[Row], cells: Cells) -> int:
    """Returns how many cells have no result yet."""
    return sum(cells.find(cell) is None for row in rows for cell in row.cells)


def measure(bench: Bench, rows: list[Row], cells: Cells, say: SayFn) -> Errors:
    """Measures the cells that have no result yet; returns {recipe: error} for the recipes that failed."""
    errors: Errors = {}
    of_all = sum(len(row.cells) for row in rows)
    for repeat in range(bench.repeats):
        for row in rows:
            wanted = [cell for cell in row.cells if cell.repeat == repeat and cells.find(cell) is None]
            if wanted and row.recipe not in errors:
                try:
                    _measure(row, wanted, cells, lambda line: say(f"{of_all - missing(rows, cells)}/{of_all} {line}"))
                except WanFastError as error:
                    errors[row.recipe] = error
                    say(f"{row.recipe}: {error}")
    return errors


def _measure(row: Row, wanted: list[Cell], cells: Cells, say: SayFn) -> None:
    """Starts the ranks of a recipe, warms them up, and measures its cells. Raises WanFastError."""
    assert row.opened is not None
    started = time.perf_counter()
    with Handle(row.opened) as handle:
        warmed = [handle.make(**row.warm_ups[clip]) for clip in dict.fromkeys(cell.clip for cell in wanted)]
        start = {"seconds": round(time.perf_counter() - started, 3), "videos": [_figures(video) for video in warmed]}
        say(f"{row.recipe}: loaded and warmed up in {start['seconds']:.1f} s")
        for cell in wanted:
            video = handle.make(**cell.options)
            sha256 = hashlib.sha256(video.frames.tobytes()).hexdigest()
            cells.put(cell, {**video.document, "frames_sha256": sha256, "start": start}, video.frames)
            seed = ", another seed" if cell.is_other_seed else ""
            total = video.document["seconds"]["total"]
            say(f"{row.recipe}: repeat {cell.repeat + 1}, clip {cell.clip + 1}{seed}: {total:.1f} s")


def _figures(video: Video) -> dict[str, Any]:
    return {name: video.document[name] for name in ("seconds", "first_step_s", "compiled_anew")}
