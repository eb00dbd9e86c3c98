"""Writes the files of a report, and the random weights for `wanfast bench --random-weights`.

This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanfast.bench.apart import apart
from wanfast.bench.cells import Cells, Row, SayFn
from wanfast.bench.page import write_page
from wanfast.bench.pictures import draw_quality, draw_waterfall
from wanfast.runtime.store.artifacts import key_of, write_synced
from wanfast.runtime.store.atomic import atomic_paths, not_written, partial_path
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.model_files import ModelFiles, locate

REPORT, PAGE, WATERFALL, QUALITY = "report.json", "report.html", "waterfall.png", "quality.png"


def with_random_weights(given: dict[str, Any], files: ModelFiles, say: SayFn) -> tuple[dict[str, Any], ModelFiles]:
    """Replaces the model by a model with the same facts and random weights; returns the new options and the new files.

    `given` and `files` are the options and the files of the original model. The folder with the random weights is
    written only if it does not exist yet.
    """
    facts = files.spec.to_json()
    key = key_of({"facts": facts, "code": digest_of_code("bench/model_folder.py", "runtime/weights/key_maps.py")})[:12]
    folder = files.artifacts / "checkpoints" / f"random-{key}"
    if not folder.exists():
        say(f"writing random weights into {folder}")
        apart("random_model", folder=str(folder), facts=facts)
    return {**given, "model": str(folder)}, locate(str(folder), str(files.artifacts))


def check_folder(folder: Path) -> None:
    """Checks, before any work, that a report can be written into `folder`. Raises ConfigError.

    If the folder is missing, the check makes it and removes it again.
    """
    probe = partial_path(folder / REPORT)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as error:
        raise not_written(folder, error) from error


def write_report(report: dict[str, Any], rows: list[Row], cells: Cells, folder: Path) -> None:
    """Writes the JSON, the pictures and the page of a report. Raises ConfigError if `folder` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    has_quality = not report["quality_left_out"]
    (folder / QUALITY).unlink(missing_ok=True)  # of an earlier report
    names = [REPORT, WATERFALL, PAGE, *([QUALITY] if has_quality else [])]
    with atomic_paths(*(folder / name for name in names)) as (document, waterfall, page, *scatter):
        write_synced(document, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        draw_waterfall(report, waterfall)
        pictures = {"Seconds": waterfall}
        for picture in scatter:
            draw_quality(report, picture)
            pictures["Speed and quality"] = picture
        write_page(report, pictures, _videos(report, rows, cells) if has_quality else {}, page)


def _videos(report: dict[str, Any], rows: list[Row], cells: Cells) -> dict[str, Path]:
    """Returns {recipe: frames of the first clip} of the measured rows."""
    measured = {row["recipe"] for row in report["rows"] if row["status"] == "measured"}
    return {row.recipe: cells.frames(row.cells[0]) for row in rows if row.recipe in measured}
