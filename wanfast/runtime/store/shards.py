"""Finds the safetensors files of one model in a folder.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.model_facts import AGAIN


def shards_in(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those that the folder's index names, or all if there is no index."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return indexed_shards(index)
    return sorted(folder.glob("*.safetensors"))


def indexed_shards(index: Path) -> list[Path]:
    """Returns the paths of the shards that a safetensors index file names.

    Raises CorruptArtifactError if the index file is damaged, or names a shard outside its own folder.
    """
    weight_map = read_object(index, AGAIN).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CorruptArtifactError(
            f"{index} has no weight_map from tensor names to file names: download this file again"
        )
    for name in names:  # a link beside the index may lead elsewhere, as in the cache of Hugging Face
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise CorruptArtifactError(
                f"{index} names {name!r:.60}, which is outside the folder of the index: download the index again"
            )
    return [index.parent / name for name in sorted(set(names))]
