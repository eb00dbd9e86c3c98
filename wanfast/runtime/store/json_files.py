"""Reads JSON files that a user, another program or a full disk may have changed.

This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanfast.runtime.errors import CorruptArtifactError, foreign

Document = dict[str, Any]  # a JSON object


def read_object(file: Path, fix: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises CorruptArtifactError if the file cannot be read or holds no object. The message names the file and ends with
    `fix`, which tells the user what to do.
    """
    with foreign(str(file), fix, CorruptArtifactError):
        document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise CorruptArtifactError(f"{file}: is not a JSON object: {fix}")
    return document
