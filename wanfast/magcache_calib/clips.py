"""Reads a calibration set: a folder with images and a `clips.jsonl`, which gives each image its prompt.

A line may also name a `last_image`. Then all lines must, because a curve is for videos with a last image or without.

Two small sets ship with the package: one of drawn scenes for the model `tiny`, and one of photographs.
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.errors import ConfigError, foreign
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.media import images

LIST = "clips.jsonl"
_EXAMPLE = '{"image": "cat.jpg", "prompt": "The cat jumps."}'
_SHIPPED = Path(__file__).parents[1] / "assets" / "calibration"


@dataclass(frozen=True)
class Clip:
    """Describes one clip of a calibration set: images, prompt and seed."""

    image: Path
    image_sha256: str
    image_size: tuple[int, int]
    prompt: str
    seed: int
    last_image: Path | None = None
    last_image_sha256: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that make a video of this clip."""
        last = {"last_image": str(self.last_image)} if self.last_image else {}
        return {"image": str(self.image), **last, "prompt": self.prompt, "seed": self.seed}


def shipped_set(spec: ModelSpec) -> Path:
    return _SHIPPED / ("tiny" if spec.name == "tiny" else "photos")


def read_set(folder: Path, seed: int, name: str = LIST) -> list[Clip]:
    """Reads the clips that the list `name` in `folder` names. The first clip gets `seed`, the next seed + 1, and so on.

    Raises ConfigError if the set is missing or malformed.
    """
    with foreign(f"--set {folder}: {name}", f"write one line per clip, such as {_EXAMPLE}"):
        lines = (folder / name).read_text(encoding="utf-8-sig").split("\n")
    clips: list[Clip] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            image, prompt = folder / document["image"], document["prompt"]
            last = folder / document["last_image"] if "last_image" in document else None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"--set {folder}: line {number} of {name} needs the keys image and prompt, such as {_EXAMPLE}"
            ) from None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(
                f"--set {folder}: line {number} of {name} has no prompt: describe what happens in the clip"
            )
        try:
            loaded = images.load_image(str(image))
            loaded_last = images.load_image(str(last)) if last else None
        except ConfigError as error:
            reason = str(error).removeprefix("--image ")
            raise ConfigError(f"--set {folder}: line {number} of {name}: {reason}") from None
        sha256 = loaded_last.sha256 if loaded_last else ""
        clips.append(Clip(image, loaded.sha256, loaded.size, prompt, seed + len(clips), last, sha256))
        if (last is None) != (clips[0].last_image is None):
            raise ConfigError(
                f"--set {folder}: line {number} of {name}: give all lines a last_image, or none of them, because a "
                "curve is for one kind of videos"
            )
    if not clips:
        raise ConfigError(f"--set {folder}: {name} names no clip: write one line per clip")
    return clips


def digest_of(clips: list[Clip]) -> str:
    """Returns a digest of the clips' images, prompts and seeds; it does not depend on the paths of the images."""
    facts = [[clip.image_sha256, clip.prompt, clip.seed, *filter(None, [clip.last_image_sha256])] for clip in clips]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()[:16]
