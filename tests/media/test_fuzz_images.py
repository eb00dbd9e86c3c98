"""Tests that damaged images of every format are read or refused in one line: no other error, no hang, little memory.

The damage is drawn by hypothesis from a fixed seed, so that every run sees the same files.
"""

from __future__ import annotations

import io
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.media.profiles import DISPLAY_P3, cmyk_profile, grey_profile, rgb_profile
from tests.small_files import assert_one_line, rgb
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media.images import LoadedImage, load_image

_SAME_EVERY_TIME = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
MAX_GROWTH_BYTES = 2.2e9  # what the largest image that is read may take


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def whole_images() -> list[bytes]:
    """Returns small images of every common format and of every mode that is converted, with profiles and EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, p3 = rgb(40, 28), rgb_profile(DISPLAY_P3)
    plain = [
        encoded(picture, name, icc_profile=p3, exif=exif) for name in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF")
    ]
    return [
        *plain,
        encoded(picture, "BMP"),
        encoded(picture, "GIF", save_all=True, append_images=[rgb(40, 28)]),
        encoded(picture, "WEBP", save_all=True, append_images=[rgb(40, 28)], lossless=True),
        encoded(picture, "TIFF", compression="tiff_lzw"),
        encoded(picture.convert("RGBA"), "PNG", icc_profile=p3),
        encoded(picture.quantize(16), "PNG", transparency=3),
        encoded(picture.convert("L"), "JPEG", icc_profile=grey_profile(1.8), progressive=True),
        encoded(picture.convert("I;16"), "PNG"),
        encoded(picture.convert("F"), "TIFF"),
        encoded(picture.convert("CMYK"), "JPEG", icc_profile=cmyk_profile((55, -37, -50))),
    ]


WHOLE = whole_images()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws an image with one to four faults: other bits or bytes, an early end, zeros, or a piece of another image."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "zeros", "splice", "bytes"]))
        if kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[start:]
        elif kind == "zeros":
            data[start : start + length * 16] = bytes(len(data[start : start + length * 16]))
        elif kind == "splice":
            other, place = draw(st.sampled_from(WHOLE)), draw(st.integers(0, 4000))
            data[start : start + length] = other[place : place + length]
        else:
            data[start : start + 4] = draw(st.binary(min_size=4, max_size=4))
    return bytes(data)


def check(data: bytes, folder: Path) -> None:
    path = folder / "damaged"
    path.write_bytes(data)
    try:
        image = load_image(str(path))
    except ConfigError as error:
        assert_one_line(error, "--image", path)
        return
    assert isinstance(image, LoadedImage) and image.pixels.mode == "RGB"
    assert all("\n" not in note for note in image.notes)


def run(examples: int, folder: Path) -> None:
    @settings(_SAME_EVERY_TIME, max_examples=examples)
    @given(damaged())
    def each_is_read_or_refused(data: bytes) -> None:
        check(data, folder)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    each_is_read_or_refused()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH_BYTES


def test_whole_images_are_read(tmp_path: Path) -> None:
    for data in WHOLE:
        (tmp_path / "whole").write_bytes(data)
        assert sorted(load_image(str(tmp_path / "whole")).size) == [28, 40]


def test_damaged_images_are_read_or_refused(tmp_path: Path) -> None:
    run(600, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_thousand_damaged_images_are_read_or_refused(tmp_path: Path) -> None:
    run(10_000, tmp_path)
