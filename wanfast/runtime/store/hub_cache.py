"""Finds published weights that another program put into the Hugging Face cache; wanfast reads them there.

The cache holds folders <root>/models--OWNER--NAME/snapshots/<commit>. The files in these folders are links to blobs.
<root> is set by the same environment variables as in huggingface_hub. huggingface_hub is not imported, because its
import takes 0.3 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeGuard

from wanfast.runtime.facts.choices import Layout

PublishedModel = Literal["a14b", "t2v-a14b"]  # values of --model
REPOS: dict[PublishedModel, dict[Layout, str]] = {
    "a14b": {"original": "Wan-AI/Wan2.2-I2V-A14B", "diffusers": "Wan-AI/Wan2.2-I2V-A14B-Diffusers"},
    "t2v-a14b": {"original": "Wan-AI/Wan2.2-T2V-A14B", "diffusers": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"},
}
# The published commits that this program was made for; --revision selects another.
PINNED = {
    "Wan-AI/Wan2.2-I2V-A14B": "206a9ee1b7bfaaf8f7e4d81335650533490646a3",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "596658fd9ca6b7b71d5057529bbf319ecbc61d74",
    "Wan-AI/Wan2.2-T2V-A14B": "c8c270b13ee05bfa474194ac9fb07a5868a97cea",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "5be7df9619b54f4e2667b2755bc6a756675b5cd7",
}


def is_published(model: str) -> TypeGuard[PublishedModel]:
    """Returns whether a value of --model names published weights."""
    return model in REPOS


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the root folder of the Hugging Face cache; the folder may be missing."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    user = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or f"{user}/huggingface").expanduser() / "hub"


def snapshots(model: PublishedModel, layout: Layout) -> Iterator[Path]:
    """Yields one or two folders of the cache in which a model's published weights may lie.

    The first folder is that of the pinned commit. The second folder is that of the branch `main`; it is left out if the
    cache does not know the branch. Each folder may be missing.
    """
    repo = REPOS[model][layout]
    yield snapshot_of(repo, PINNED[repo])
    with suppress(OSError, ValueError):
        main = _folder(repo) / "refs" / "main"
        yield snapshot_of(repo, main.read_text(encoding="utf-8").strip())


def snapshot_of(repo: str, commit: str) -> Path:
    """Returns the folder of one commit in the Hugging Face cache; the folder may be missing."""
    return _folder(repo) / "snapshots" / commit


def name_of(folder: Path) -> str:
    """Returns the repository's name if `folder` is a commit's folder in the cache, else the name of `folder`."""
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.parents[1].name.rpartition("--")[2] if in_cache else folder.name


def _folder(repo: str) -> Path:
    return cache_root() / f"models--{repo.replace('/', '--')}"
