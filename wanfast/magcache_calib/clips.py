"""Reads a calibration set: a folder with images and a file `clips.jsonl` with a prompt for each image.

Two small sets ship with the package: one of drawn scenes for the model `tiny`, and one of photographs.
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from wanfast.runtime.errors import ConfigError, foreign
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.media import images

LIST = "clips.jsonl"
_EXAMPLE = '{"image": "cat.jpg", "prompt": "The cat jumps."}'
_SHIPPED = Path(__file__).parents[1] / "assets" / "calibration"


@dataclass(frozen=True)
class Clip:
    """Describes one clip of a calibration set: image, prompt and seed."""

    image: Path
    image_sha256: str
    image_size: tuple[int, int]
    prompt: str
    seed: int


def shipped_set(spec: ModelSpec) -> Path:
    return _SHIPPED / ("tiny" if spec.name == "tiny" else "photos")


def read_set(folder: Path, seed: int, name: str = LIST) -> list[Clip]:
    """Reads the clips of a set from the file `name` in `folder`.

    The first clip gets `seed`, the second gets seed + 1, and so on. Raises ConfigError if the set is missing or
    malformed.
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
        except ConfigError as error:
            reason = str(error).removeprefix("--image ")
            raise ConfigError(f"--set {folder}: line {number} of {name}: {reason}") from None
        clips.append(Clip(image, loaded.sha256, loaded.size, prompt, seed + len(clips)))
    if not clips:
        raise ConfigError(f"--set {folder}: {name} names no clip: write one line per clip")
    return clips


def digest_of(clips: list[Clip]) -> str:
    """Returns a digest of the clips' images, prompts and seeds; it does not depend on the paths of the images."""
    facts = [[clip.image_sha256, clip.prompt, clip.seed] for clip in clips]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()[:16]
