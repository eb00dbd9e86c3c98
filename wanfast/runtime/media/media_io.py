"""Images in, video out: the one image that a clip starts from, and the frames that it ends as.

The idea: the parent reads and refuses, the worker computes. `load_image` and `check_output` run before any GPU is
taken and never import torch, so a bad file costs a second and one line. Whatever is done to an image on its way to
8-bit RGB is said in `LoadedImage.notes`; nothing is cropped or rescaled here (`pixels` does that).
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
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)  # Pillow, bad files


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """An image as the model will see it, before it is resized."""

    pixels: Image
    """8-bit RGB, upright."""
    sha256: str
    """Of the file's bytes."""
    notes: tuple[str, ...]
    """What was done to it, in words for the plan; empty for a plain RGB file."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.size


def load_image(path: str, option: str = "--image") -> LoadedImage:
    """Read, check and fully decode an image file; the first frame if it has several.

    Raises ConfigError, one line with `option`, the file and the fix: not a readable file, not a whole image, a side
    below 16 pixels, sides further apart than 4:1, or more pixels than Pillow thinks safe to decode (178 million).
    """
    subject = f"{option} {path}"
    data = _read_bytes(path, subject)
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large or odd files: refused below, or harmless
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size, subject)
                pixels, notes = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{subject}: more than 178 megapixels; scale it down, 4 megapixels are plenty") from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"{subject}: not an image that Pillow can read; convert it to PNG or JPEG") from error
    except _DECODER_ERRORS as error:
        raise ConfigError(f"{subject}: truncated or damaged ({error}); copy it again or save it as PNG") from error
    return LoadedImage(pixels=pixels, sha256=hashlib.sha256(data).hexdigest(), notes=tuple(notes))


def check_output(path: str, *, overwrite: bool, needed_bytes: int, option: str = "--output") -> Path:
    """The path, once it is sure that an mp4 of `needed_bytes` can be written there: called before any work is done.

    Raises ConfigError, one line with `option`, the path and the fix.
    """
    target, subject = Path(path), f"{option} {path}"
    if target.suffix.lower() != ".mp4":
        raise ConfigError(f"{subject}: the name must end in .mp4")
    folder, probe = target.parent, partial_path(target)
    try:
        if not folder.exists():
            raise ConfigError(f"{subject}: its folder does not exist; make it: mkdir -p {folder}")
        probe.touch()  # os.access cannot tell: it answers yes to root, and on a read-only mount
        probe.unlink()
        exists, is_folder, free_bytes = target.exists(), target.is_dir(), shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"{subject}: cannot be written ({error.strerror}); choose another folder or name") from error
    if is_folder:
        raise ConfigError(f"{subject}: is a folder; name a file in it, such as {target / 'video.mp4'}")
    if exists and not overwrite:
        raise ConfigError(f"{subject}: exists; choose another name or add --overwrite")
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{subject}: needs {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free; "
            "free some space or choose another folder"
        )
    return target


def write_mp4(frames: npt.NDArray[np.uint8], path: Path, fps: int) -> None:
    """Write frames [F, H, W, 3], even H and W, as H.264: CRF 10, yuv420p, index first so that it plays while loading.

    The same frames give the same bytes, which takes two settings. The thread count shapes the stream, so it is fixed.
    `cpu-independent` keeps x264 from its assembly for macroblock-tree, which reads memory that nothing has written
    (AVX-512 machine, PyAV 18.1: other bytes for every MALLOC_PERTURB_, and from run to run in one process).
    The colour matrix is named in the file, since players guess another one from 720 lines up.
    Through PyAV itself: imageio's plugin over it drops encoder options (asked for CRF 10, the stream said 23).
    Raises OSError if the disk refuses: the caller makes the file appear whole or not at all.
    """
    import av

    same_bytes = {"threads": "8", "thread_type": "frame", "x264-params": "cpu-independent=1"}
    colours = {"colorspace": "smpte170m", "color_range": "tv"}  # what swscale makes of RGB
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", **same_bytes, **colours})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_contact_sheet(frames: npt.NDArray[np.uint8], path: Path, columns: int = 4, count: int = 8) -> None:
    """Write a PNG of `count` evenly spaced frames of [F, H, W, 3], row by row, the first and the last among them.

    A clip of fewer frames shows them all. Raises OSError if the disk refuses.
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
        raise ConfigError(f"{subject}: {width}x{height} pixels; use an image of at least {MIN_SIDE}x{MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise ConfigError(f"{subject}: {width}x{height} is longer than {MAX_ASPECT}:1; crop it")


def _to_rgb(image: Image) -> tuple[Image, list[str]]:
    """Decode the first frame; turn it upright; bring it to 8-bit RGB. Returns it with what was done."""
    from PIL import ExifTags, ImageOps

    notes = []
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        image.seek(0)
        notes.append(f"the first of {num_frames} frames is used")
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # asked before load: Pillow turns a TIFF itself
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
            notes.append("transparency laid on white")
    if image.mode != "RGB":
        notes.append(f"converted from {image.mode} to RGB")
    return image.convert("RGB"), notes


def _deep_grey_to_8_bit(image: Image) -> tuple[Image, str]:
    """White is 65535, or 1.0 in floating point; values outside say that it is not, and then their own range is used."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("values that are not finite")
    black, white = (0.0, 1.0) if image.mode == "F" else (0.0, 65535.0)
    if low < black or high > white:
        black, white = low, max(high, low + 1)
    scaled = np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
    return Image.fromarray(scaled), f"mode {image.mode} scaled to 8 bits: {black:g}..{white:g} to 0..255"


def _on_white(image: Image) -> tuple[Image, bool]:
    """RGB on white, and whether any of it was transparent."""
    from PIL import Image

    rgba = image.convert("RGBA")
    lowest_alpha, _ = rgba.getchannel("A").getextrema()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), lowest_alpha != 255
