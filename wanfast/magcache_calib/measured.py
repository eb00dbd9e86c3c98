"""Stores the measurements of each clip of a calibration, so that an interrupted calibration resumes.

This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanfast.runtime.errors import CorruptArtifactError, MissingArtifactError
from wanfast.runtime.store.artifacts import ArtifactStore, key_of, replace_text
from wanfast.runtime.store.json_files import read_object


def clip_file(store: ArtifactStore, kind: str, inputs: dict[str, Any]) -> Path:
    """Returns the path of the file that stores one clip's measurements.

    `kind`: the kind of artifact that the calibration makes, such as "magcache". `inputs`: all values on which the
    measurements depend; the file's name is a hash of these values.
    """
    return store.root / f"{kind}_clips" / f"{key_of(inputs)[:12]}.json"


def read_clip(
    store: ArtifactStore, kind: str, inputs: dict[str, Any], is_whole: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """Returns a clip's stored measurements, or None if they are missing, incomplete or were made with other `inputs`.

    `kind` and `inputs` are those of `clip_file`. `is_whole` returns whether measurements are complete.
    """
    try:
        document = read_object(clip_file(store, kind, inputs), "it is measured again")
        same = document["inputs"] == json.loads(json.dumps(inputs))
        found: dict[str, Any] = document["measured"]
        return found if same and is_whole(found) else None
    except (CorruptArtifactError, KeyError, TypeError, AttributeError):
        return None


def require_clip(
    store: ArtifactStore, kind: str, inputs: dict[str, Any], is_whole: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Returns a clip's stored measurements. Raises MissingArtifactError if `read_clip` returns None."""
    measured = read_clip(store, kind, inputs, is_whole)
    if measured is None:
        raise MissingArtifactError(
            f"{clip_file(store, kind, inputs)}: a clip was measured, but its file is missing or incomplete now: "
            "another calibration may have replaced the file: end other calibrations, then run this command again"
        )
    return measured


def write_clip(store: ArtifactStore, kind: str, inputs: dict[str, Any], measured: dict[str, Any]) -> None:
    replace_text(clip_file(store, kind, inputs), json.dumps({"inputs": inputs, "measured": measured}))
