"""Reads a calibration set: a folder that holds a file `clips.jsonl` and images.

Each line of `clips.jsonl` describes one clip: a JSON object with the keys `image` and `prompt`. A line may also have
the key `last_image`. Then all lines must have it, because a set is either for videos with a last image or for videos
without one. In a set for a model that makes videos from text alone, each line has only the key `prompt`.

Three small sets ship with the package: drawn scenes for the model `tiny`, photographs for other models that take
images, and texts for models that take no image.
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
_IMAGES = ("image", "last_image")
_EXAMPLE = '{"image": "cat.jpg", "prompt": "The cat jumps."}'
_EXAMPLE_OF_TEXT = '{"prompt": "A cat jumps."}'
_SHIPPED = Path(__file__).parents[1] / "assets" / "calibration"


@dataclass(frozen=True)
class Clip:
    """Describes one clip of a calibration set: images, prompt and seed."""

    image: Path | None
    image_sha256: str
    image_size: tuple[int, int]
    prompt: str
    seed: int
    last_image: Path | None = None
    last_image_sha256: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that make a video of this clip."""
        images = {"image": self.image, "last_image": self.last_image}
        given = {name: str(path) for name, path in images.items() if path}
        return {**given, "prompt": self.prompt, "seed": self.seed}


def shipped_set(spec: ModelSpec) -> Path:
    """Returns the folder of the calibration set for a model; the set ships with the package."""
    return _SHIPPED / ("texts" if not spec.takes_images else "tiny" if spec.name == "tiny" else "photos")


def read_set(folder: Path, seed: int, name: str = LIST, *, takes_images: bool = True) -> list[Clip]:
    """Reads the clips of a set from the file `name` in `folder`.

    The first clip gets `seed`, the second gets seed + 1, and so on. `takes_images`: whether the set is for a model that
    takes images. Raises ConfigError if the set is missing or malformed.
    """
    example = _EXAMPLE if takes_images else _EXAMPLE_OF_TEXT
    with foreign(f"--set {folder}: {name}", f"write one line per clip, such as {example}"):
        lines = (folder / name).read_text(encoding="utf-8-sig").split("\n")
    clips: list[Clip] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"--set {folder}: line {number} of {name}"
            clips.append(_read_clip(line, folder, place, seed + len(clips), takes_images=takes_images))
            if (clips[-1].last_image is None) != (clips[0].last_image is None):
                raise ConfigError(
                    f"{place}: give every line a last_image, or remove last_image from every line, because a set is "
                    "either for videos with a last image or for videos without one"
                )
    if not clips:
        raise ConfigError(f"--set {folder}: {name} names no clip: write one line per clip")
    return clips


def _read_clip(line: str, folder: Path, place: str, seed: int, *, takes_images: bool) -> Clip:
    """Reads one line of a set; `place` names the line in an error. Raises ConfigError."""
    try:
        document = json.loads(line)
        prompt = document["prompt"]
        named = {key: folder / document[key] for key in _IMAGES if key in document or (key == "image" and takes_images)}
    except (ValueError, KeyError, TypeError, RecursionError):
        needs = "needs the keys image and prompt" if takes_images else "needs the key prompt"
        raise ConfigError(f"{place} {needs}, such as {_EXAMPLE if takes_images else _EXAMPLE_OF_TEXT}") from None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{place} has no prompt: describe what happens in the clip")
    if named and not takes_images:
        raise ConfigError(f"{place}: the model makes videos from text alone: remove the key {next(iter(named))}")
    try:
        loaded = {key: images.load_image(str(path)) for key, path in named.items()}
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('--image ')}") from None
    sha256 = {key: image.sha256 for key, image in loaded.items()}
    return Clip(
        image=named.get("image"),
        image_sha256=sha256.get("image", ""),
        image_size=loaded["image"].size if loaded else (0, 0),
        prompt=prompt,
        seed=seed,
        last_image=named.get("last_image"),
        last_image_sha256=sha256.get("last_image", ""),
    )


def digest_of(clips: list[Clip]) -> str:
    """Returns a digest of the clips' images, prompts and seeds; it does not depend on the paths of the images."""
    facts = [[clip.image_sha256, clip.prompt, clip.seed, *filter(None, [clip.last_image_sha256])] for clip in clips]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()[:16]
