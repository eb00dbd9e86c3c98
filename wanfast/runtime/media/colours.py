"""Converts a decoded image to 8-bit sRGB without transparency, and describes each step in a note for the user.

An embedded ICC profile is applied. Without a profile, colours are taken as sRGB. These are not applied, and a note
says so:
* a damaged profile;
* a profile for another colour space than that of the pixels;
* a PNG's gamma;
* the primaries that a HEIC file names by number.
A PNG's cICP chunk and an AVIF's primaries are not applied either. No note says so, because Pillow does not report them.
An image with 16 bits a channel becomes an image with 8 bits. If it has colours, Pillow keeps the upper byte of each
value. If it is grey, this module scales the values.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from wanfast.runtime.errors import ConfigError, foreign

if TYPE_CHECKING:
    from PIL.Image import Image

_PNG_GAMMA, _H273_PRIMARIES = 1 / 2.2, 1  # sRGB's, as a PNG and as a HEIC state them


def to_rgb(image: Image, subject: str) -> tuple[Image, list[str]]:
    """Converts a decoded image to 8-bit sRGB; returns (the converted image, notes for the user).

    Each note names one step of the conversion, or something in the file that is not applied.
    Transparent pixels are blended with white. Raises ConfigError if the pixels cannot be converted; the
    message begins with `subject`.
    """
    notes, described = [], dict(image.info)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, note = _deep_grey_to_8_bit(image, subject)
        notes.append(note)
    has_alpha = image.has_transparency_data
    with foreign(f"{subject}: its pixels cannot be converted to RGB", "save the image as PNG"):
        rgba = image.convert("RGBA" if has_alpha else "RGB")
        rgb = rgba.convert("RGB")
    rgb, colour_notes = _to_srgb(image, rgb, described)
    notes += colour_notes
    if has_alpha and rgba.getchannel("A").getextrema() != (255, 255):
        rgb = _on_white(rgb, rgba.getchannel("A"))
        notes.append("transparent pixels are blended with white")
    if not has_alpha and image.mode != "RGB":
        notes.append(f"converted from {image.mode} to RGB")
    return rgb, notes


def _to_srgb(image: Image, rgb: Image, described: dict[Any, Any]) -> tuple[Image, list[str]]:
    """Returns the colours of `rgb`, which is `image` as Pillow converts it, in sRGB.

    They stay as they are if no profile can be applied, or if the profile moves none by more than one level.
    """
    import numpy as np
    from PIL import ImageChops

    if not (data := described.get("icc_profile")):
        return rgb, _unapplied(described)
    try:
        converted, name = _by_profile(image, rgb, data)
    except ConfigError as error:
        return rgb, [str(error)]
    if np.asarray(ImageChops.difference(rgb, converted)).max() <= 1:  # another wording of sRGB
        return rgb, []
    return converted, [f"colours converted from {name} to sRGB"]


def _by_profile(image: Image, rgb: Image, data: bytes) -> tuple[Image, str]:
    """Converts colours by an ICC profile, and returns them with the profile's name. Raises ConfigError."""
    from PIL import ImageCms

    with foreign("the image's colour profile", "the profile is ignored"):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        described = profile.profile.xcolor_space, profile.profile.profile_description or ""
    space, name = map(_shown, described)
    source = _described_by(space, image, rgb)
    if source is None:
        raise ConfigError(
            f"the image's colour profile is for {space} pixels, not for {image.mode}: the profile is ignored"
        )
    with foreign("the image's colour profile", "the profile is ignored"):
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        black = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(profile, srgb, source.mode, "RGB", intent, black)
        converted = ImageCms.applyTransform(source, transform)
    assert converted is not None  # it is None only in place
    return converted, name or "a profile without a name"


def _described_by(space: str, image: Image, rgb: Image) -> Image | None:
    """Returns the pixels that a profile of `space` can describe; None if the image has no such pixels."""
    if space == "GRAY" and image.mode in ("1", "L", "LA"):
        return rgb.getchannel(0)
    if space == "CMYK" and image.mode == "CMYK":
        return image
    return rgb if space == "RGB" and image.mode not in ("CMYK", "LAB") else None


def _shown(text: str) -> str:
    """Returns a file's text in at most 40 letters that any terminal shows."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:40]


def _unapplied(described: dict[Any, Any]) -> list[str]:
    """Returns a note if an image without a profile names colours other than sRGB in another way."""
    gamma = described.get("gamma", _PNG_GAMMA)
    if "srgb" not in described and abs(gamma - _PNG_GAMMA) > 0.01:
        return [f"the image's gamma of {gamma:g} is not applied: colours are taken as sRGB"]
    primaries = (described.get("nclx_profile") or {}).get("color_primaries", _H273_PRIMARIES)
    if primaries not in (_H273_PRIMARIES, 2):  # 2: not known
        return [
            f"the image's colour primaries (number {primaries} of H.273) are not applied: colours are taken as sRGB"
        ]
    return []


def _deep_grey_to_8_bit(image: Image, subject: str) -> tuple[Image, str]:
    """Scales grey of more than 8 bits to 8 bits; white is 65535, or 1.0 in floating point.

    If a value is outside the range from 0 to white, the image's own range is used. Raises ConfigError.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ConfigError(f"{subject}: has values that are not finite: save the image as PNG")
    black, white = (0.0, 1.0) if image.mode == "F" else (0.0, 65535.0)
    if low < black or high > white:
        black, white = low, max(high, low + 1)
    scaled = np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
    return Image.fromarray(scaled), f"mode {image.mode} scaled to 8 bits: {black:g}..{white:g} to 0..255"


def _on_white(rgb: Image, alpha: Image) -> Image:
    """Blends an image with white."""
    from PIL import Image

    rgba = rgb.convert("RGBA")
    rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
