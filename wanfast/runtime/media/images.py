"""Reads and checks the image that a clip starts from.

The parent process reads and validates; the worker computes. `load_image` runs before any GPU is used and never imports
torch, so that a bad file costs one second and one line. Nothing is cropped or resized here (`pixels` does that).
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media.colours import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 16  # pixels: one token
MAX_ASPECT = 4  # long side : short side
# Pillow raises these for bad files.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """This class holds an image as the model sees it, before it is resized."""

    pixels: Image
    """8-bit RGB, upright."""
    sha256: str
    """The hash of the file's bytes."""
    notes: tuple[str, ...]
    """The steps of the conversion, in words for the plan; empty for an RGB file."""

    @property
    def size(self) -> tuple[int, int]:
        """Returns (width, height) in pixels."""
        return self.pixels.size


def load_image(path: str, option: str = "--image") -> LoadedImage:
    """Reads, checks and fully decodes an image file; uses the first frame if the file has several.

    Raises ConfigError, one line with `option`, the file and the fix, for: an unreadable file, an incomplete image, a
    side below 16 pixels, an aspect ratio above 4:1, or more pixels than Pillow considers safe (178 million).
    """
    subject = f"{option} {path}"
    data = _read_bytes(path, subject)
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on large or odd files: refused below, or harmless
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size, subject)
                pixels, notes = to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{subject}: has more than 178 megapixels; scale it down (4 megapixels are enough)"
        ) from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"{subject}: is not an image that Pillow can read; convert it to PNG or JPEG") from error
    except _DECODER_ERRORS as error:
        raise ConfigError(f"{subject}: is truncated or damaged ({error}); copy it again or save it as PNG") from error
    return LoadedImage(pixels=pixels, sha256=hashlib.sha256(data).hexdigest(), notes=tuple(notes))


def _read_bytes(path: str, subject: str) -> bytes:
    file = Path(path)
    try:
        if file.is_dir():
            raise ConfigError(f"{subject}: is a folder; name an image file in it")
        if not file.exists():
            raise ConfigError(f"{subject}: no such file; check the path")
        if not file.is_file():
            raise ConfigError(f"{subject}: is a pipe or a device; name an image file")
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{subject}: cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise ConfigError(f"{subject}: is empty; copy it again")
    return data


def _check_size(width: int, height: int, subject: str) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ConfigError(f"{subject}: has {width}x{height} pixels; use an image of at least {MIN_SIDE}x{MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise ConfigError(f"{subject}: {width}x{height} is longer than {MAX_ASPECT}:1; crop it")
