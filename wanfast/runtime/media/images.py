"""Reads and checks the image that a video starts from, and the image that it ends with.

The parent process calls `load_image` before any GPU is used. This module does not import torch, so that a bad file is
refused within a second. The error message has one line. Nothing is cropped or resized here (`engine.pixels` does that).
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.errors import ConfigError, foreign
from wanfast.runtime.facts.shapes import MAX_ASPECT
from wanfast.runtime.machine.packages import install
from wanfast.runtime.media.colours import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MIN_SIDE = 16  # pixels: one token
MAX_MEGAPIXELS = 64  # a phone's 50 fit; converting them takes up to 2 GB
MAX_FILE_BYTES = 1 << 30  # 64 megapixels of four 32-bit channels, uncompressed
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of its first box
_UPRIGHT = {  # EXIF orientation -> the turn that undoes it
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """This class holds a decoded image, upright and in 8-bit RGB, before it is resized for the model."""

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
    """Reads, checks and fully decodes an image file; if the file has several frames, uses the first one.

    Raises ConfigError for an unreadable file, a file over 1 GiB, an incomplete image, a side below 16 pixels, an aspect
    ratio above 4:1, or more than 64 megapixels. The message is one line with the option, the file and the fix. `option`
    is the name of the option that gave `path`.
    """
    subject = f"{option} {path}"
    data = _read_bytes(path, subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on large or odd files: refused here, or harmless
        image, notes = _decoded(data, subject)
        pixels, colour_notes = to_rgb(image, subject)
    return LoadedImage(pixels=pixels, sha256=hashlib.sha256(data).hexdigest(), notes=(*notes, *colour_notes))


def _decoded(data: bytes, subject: str) -> tuple[Image, list[str]]:
    """Decodes the first frame and turns it upright; returns it with notes on these steps. Raises ConfigError."""
    from PIL import Image

    notes = []
    opened = _opened(data, subject)
    _check_size(*opened.size, subject)
    with foreign(*_damaged(subject)):
        num_frames = getattr(opened, "n_frames", 1)
    orientation = _orientation(opened)  # asked before `load`, where Pillow turns a TIFF itself
    with foreign(*_damaged(subject)):
        opened.load()
    image: Image.Image = opened
    if num_frames > 1:
        notes.append(f"the image file has {num_frames} frames: only the first is used")
    if orientation is None:
        notes.append("the image's EXIF data is damaged: the image may not be upright")
    if orientation in _UPRIGHT:
        notes.append(f"the image was turned upright (EXIF orientation {orientation})")
        if _orientation(opened) == orientation:
            image = opened.transpose(Image.Transpose[_UPRIGHT[orientation]])
    return image, notes


def _damaged(subject: str) -> tuple[str, str]:
    """Returns the subject and the fix of an image that Pillow cannot decode."""
    return f"{subject}: is truncated or damaged", "copy it again or save it as PNG"


def _opened(data: bytes, subject: str) -> ImageFile:
    """Reads the header of an image. Raises ConfigError."""
    from PIL import Image, UnidentifiedImageError

    reads_heic = _register_heic()
    try:
        with foreign(*_damaged(subject)):
            return Image.open(io.BytesIO(data))
    except ConfigError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise _too_large(subject, "too many") from error
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        if not reads_heic and data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise ConfigError(f"{subject}: is a HEIC image; run `{install('heic')}`, or save it as JPEG") from error
        raise ConfigError(f"{subject}: is not an image that Pillow can read; convert it to PNG or JPEG") from error


def _register_heic() -> bool:
    """Lets Pillow read HEIC images, if the extra `heic` is installed, and returns whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _orientation(image: Image) -> int | None:
    """Returns the EXIF orientation, 1 if the image has none; None if its EXIF data is damaged."""
    from PIL import ExifTags

    try:
        with foreign("EXIF", "ignored"):
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ConfigError:
        return None
    return value if isinstance(value, int) else None


def _read_bytes(path: str, subject: str) -> bytes:
    file = Path(path)
    try:
        if file.is_dir():
            raise ConfigError(f"{subject}: is a folder; give an image file in it")
        if not file.exists():
            raise ConfigError(f"{subject}: no such file; check the path")
        if not file.is_file():
            raise ConfigError(f"{subject}: is a pipe or a device; give an image file")
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(
                f"{subject}: has {size / 1e9:.1f} GB, which is too large for an image; give an image file"
            )
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
        raise ConfigError(f"{subject}: {width}x{height} has an aspect ratio above {MAX_ASPECT}:1; crop the image")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise _too_large(subject, f"{width}x{height}")


def _too_large(subject: str, pixels: str) -> ConfigError:
    return ConfigError(
        f"{subject}: has {pixels} pixels; scale the image to at most {MAX_MEGAPIXELS} megapixels "
        "(4 megapixels are enough)"
    )
