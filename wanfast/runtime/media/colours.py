"""Converts the decoded first frame of an image file to 8-bit RGB, upright, and says how in notes for the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def to_rgb(image: Image) -> tuple[Image, list[str]]:
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
