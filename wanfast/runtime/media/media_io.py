"""Reads the image that a clip starts from, and writes the frames of the clip as a video.

The parent process reads and validates; the worker computes. `load_image` and `check_output` run before any GPU is
used and never import torch, so that a bad file costs one second and one line. `LoadedImage.notes` lists every step of
the conversion to 8-bit RGB. Nothing is cropped or resized here (`pixels` does that).
"""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.store.atomic import partial_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
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
                pixels, notes = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{subject}: has more than 178 megapixels; scale it down (4 megapixels are enough)"
        ) from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"{subject}: is not an image that Pillow can read; convert it to PNG or JPEG") from error
    except _DECODER_ERRORS as error:
        raise ConfigError(f"{subject}: is truncated or damaged ({error}); copy it again or save it as PNG") from error
    return LoadedImage(pixels=pixels, sha256=hashlib.sha256(data).hexdigest(), notes=tuple(notes))


def check_output(path: str, *, overwrite: bool, needed_bytes: int, option: str = "--output") -> Path:
    """Checks before any work is done that an mp4 of `needed_bytes` can be written to `path`, and returns the path.

    Raises ConfigError, one line with `option`, the path and the fix.
    """
    target, subject = Path(path), f"{option} {path}"
    if target.suffix.lower() != ".mp4":
        raise ConfigError(f"{subject}: the name must end in .mp4")
    folder, probe = target.parent, partial_path(target)
    try:
        if not folder.exists():
            raise ConfigError(f"{subject}: its folder does not exist; make it with `mkdir -p {folder}`")
        probe.touch()  # os.access does not help: it says yes to root, and on a read-only mount
        probe.unlink()
        exists, is_folder, free_bytes = target.exists(), target.is_dir(), shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"{subject}: cannot be written ({error.strerror}); choose another folder or name") from error
    if is_folder:
        raise ConfigError(f"{subject}: is a folder; name a file in it, such as {target / 'video.mp4'}")
    if exists and not overwrite:
        raise ConfigError(f"{subject}: already exists; choose another name or add --overwrite")
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{subject}: needs {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free; "
            "free some space or choose another folder"
        )
    return target


def write_mp4(frames: npt.NDArray[np.uint8], path: Path, fps: int) -> None:
    """Writes frames [F, H, W, 3], with even H and W, as H.264: CRF 10, yuv420p.

    The index comes first, so that the video plays while it loads. The same frames give the same bytes, because of two
    settings. The thread count is fixed, because it changes the stream. `cpu-independent` turns off x264's assembly for
    macroblock-tree, which reads uninitialized memory. (AVX-512 machine, PyAV 18.1: the bytes differed for every
    MALLOC_PERTURB_, and from run to run in one process.)
    The file names its colour matrix, because players guess another one from 720 lines up.
    This function uses PyAV itself, because imageio's plugin drops encoder options (asked for CRF 10, the stream said
    23). Raises OSError if the disk cannot be written; the caller publishes the file completely or not at all.
    """
    import av

    same_bytes = {"threads": "8", "thread_type": "frame", "x264-params": "cpu-independent=1"}
    colours = {"colorspace": "smpte170m", "color_range": "tv"}  # what swscale converts RGB to
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", **same_bytes, **colours})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_contact_sheet(frames: npt.NDArray[np.uint8], path: Path, columns: int = 4, count: int = 8) -> None:
    """Writes a PNG of `count` evenly spaced frames of [F, H, W, 3], row by row, with the first and the last frame.

    If the clip has fewer frames, all are shown. Raises OSError if the disk cannot be written.
    """
    import numpy as np
    from PIL import Image

    num_frames, height, width, _ = frames.shape
    count = min(count, num_frames)
    columns = min(columns, count)
    sheet = np.zeros((-(-count // columns) * height, columns * width, 3), dtype=np.uint8)
    for cell in range(count):
        top, left = cell // columns * height, cell % columns * width
        sheet[top : top + height, left : left + width] = frames[cell * (num_frames - 1) // max(count - 1, 1)]
    Image.fromarray(sheet).save(path, format="PNG")


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


def _to_rgb(image: Image) -> tuple[Image, list[str]]:
    """Decodes the first frame, turns it upright, converts it to 8-bit RGB, and returns it with notes on these steps."""
    from PIL import ExifTags, ImageOps

    notes = []
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        image.seek(0)
        notes.append(f"the first of {num_frames} frames is used")
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # read before load: Pillow turns a TIFF itself
    image.load()
    if orientation in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes.append(f"turned upright (EXIF orientation {orientation})")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, note = _deep_grey_to_8_bit(image)
        notes.append(note)
    if image.has_transparency_data:
        image, is_transparent = _on_white(image)
        if is_transparent:
            notes.append("transparent pixels are blended with white")
    if image.mode != "RGB":
        notes.append(f"converted from {image.mode} to RGB")
    return image.convert("RGB"), notes


def _deep_grey_to_8_bit(image: Image) -> tuple[Image, str]:
    """Scales grey of more than 8 bits to 8 bits; white is 65535, or 1.0 in floating point.

    If a value is outside the range from 0 to white, the image's own range is used.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("it has values that are not finite")
    black, white = (0.0, 1.0) if image.mode == "F" else (0.0, 65535.0)
    if low < black or high > white:
        black, white = low, max(high, low + 1)
    scaled = np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
    return Image.fromarray(scaled), f"mode {image.mode} scaled to 8 bits: {black:g}..{white:g} to 0..255"


def _on_white(image: Image) -> tuple[Image, bool]:
    """Returns the image as RGB on white, and whether any pixel was transparent."""
    from PIL import Image

    rgba = image.convert("RGBA")
    lowest_alpha, _ = rgba.getchannel("A").getextrema()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), lowest_alpha != 255
