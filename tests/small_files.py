"""Holds what the tests of images and of videos share: small pictures, saved files, and the form of a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from wanfast.runtime.errors import ConfigError

pillow_heif.register_heif_opener()  # so that `saved` writes HEIC
RNG = np.random.default_rng(0)


def rgb(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_one_line(error: ConfigError, option: str, path: object) -> None:
    assert error.exit_code == 2
    assert str(error).startswith(f"{option} {path}: ")
    assert "\n" not in str(error)
