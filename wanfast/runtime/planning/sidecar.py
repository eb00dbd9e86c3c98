"""Writes the JSON beside every video: options, plan, versions and seconds, from which the run can be repeated.

The video, its JSON and its contact sheet are written together or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.runtime.machine.packages import versions
from wanfast.runtime.media import video_file
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.atomic import atomic_paths

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def planned(plan: Plan) -> dict[str, Any]:
    """Returns the document of a dry run; a run adds its seconds, memory, hardware and weights."""
    return {
        "output": plan.config.output.output,
        "plan": plan.to_json(),
        "requested": dict(plan.requested),
        "effective": plan.config.to_json(),
        "seconds": {},
        "versions": versions(),
    }


def with_seconds(document: dict[str, Any], facts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Returns the document with the facts of a run, the rounded seconds of its stages, and their total."""
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return document | facts | {"seconds": rounded | {"total": round(sum(seconds.values()), 3)}}


def write_video(
    frames: npt.NDArray[np.uint8], document: dict[str, Any], outputs: tuple[Path, ...], *, overwrite: bool
) -> dict[str, Any]:
    """Writes frames [F, H, W, 3] as `outputs` = (mp4, JSON, perhaps a contact sheet) and returns the JSON.

    The time to write and the file's hash are added to `document`, which comes from `with_seconds`. Raises ConfigError.
    """
    with atomic_paths(*outputs, overwrite=overwrite) as (mp4, json_file, *sheet):
        started = time.perf_counter()
        video_file.write_mp4(frames, mp4, document["plan"]["fps"])
        for path in sheet:
            video_file.write_contact_sheet(frames, path)
        stages = {name: value for name, value in document["seconds"].items() if name != "total"}
        document = with_seconds(document, {}, stages | {"write": time.perf_counter() - started})
        document["output_sha256"] = hashlib.sha256(mp4.read_bytes()).hexdigest()
        json_file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return document
