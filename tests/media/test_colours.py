"""Tests that the colour information of a file is applied or named: ICC profiles of every kind, and PNG's gamma."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from tests.media.profiles import DISPLAY_P3, SRGB, cmyk_profile, grey_profile, rgb_profile
from tests.small_files import rgb, saved
from wanfast.runtime.media.images import LoadedImage, load_image

P3 = rgb_profile(DISPLAY_P3, "Display P3")
RED, RED_OF_P3 = (200, 60, 60), (217, 42, 52)  # Display P3's RED in sRGB, by the matrices of CSS Color 4
P3_NOTE = "colours converted from Display P3 to sRGB"


def loaded(folder: Path, image: Image.Image, name: str = "a.png", profile: bytes | None = P3) -> LoadedImage:
    return load_image(saved(folder, image, name, icc_profile=profile))


def first_pixel(image: LoadedImage) -> np.ndarray:
    return np.array(image.pixels)[0, 0].astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.avif", "a.heic"])
def test_display_p3_becomes_srgb(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (32, 32), RED), name, icc_profile=P3, quality=100)
    image = load_image(path)
    assert np.abs(first_pixel(image) - RED_OF_P3).max() <= (1 if name in ("a.png", "a.tif") else 3)
    assert image.notes == (P3_NOTE,)


def test_conversion_is_the_formula(tmp_path: Path) -> None:
    original = rgb()
    encoded = np.array(original) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.array(DISPLAY_P3) @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    expected = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(np.array(loaded(tmp_path, original).pixels) - expected).max() < 1.5


@pytest.mark.parametrize(
    "profile", [rgb_profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_profile_of_srgb_changes_nothing(profile: bytes, tmp_path: Path) -> None:
    original = rgb()
    image = loaded(tmp_path, original, profile=profile)
    assert image.pixels.tobytes() == original.tobytes()
    assert image.notes == ()


def test_transparent_and_palette_pixels_are_converted_before_they_are_blended(tmp_path: Path) -> None:
    clear = loaded(tmp_path, Image.new("RGBA", (32, 32), (*RED, 51)))
    assert np.abs(first_pixel(clear) - (np.array(RED_OF_P3) * 0.2 + 255 * 0.8)).max() <= 1
    assert clear.notes == (P3_NOTE, "transparent pixels are blended with white")
    palette = loaded(tmp_path, Image.new("RGB", (32, 32), RED).quantize(4))
    assert np.abs(first_pixel(palette) - RED_OF_P3).max() <= 1
    assert palette.notes == (P3_NOTE, "converted from P to RGB")


def test_grey_profile(tmp_path: Path) -> None:
    image = loaded(tmp_path, Image.new("L", (32, 32), 55), profile=grey_profile(1.0))
    assert np.abs(first_pixel(image) - 128).max() <= 1  # 55 / 255 of the light
    assert image.notes == ("colours converted from a grey test to sRGB", "converted from L to RGB")
    deep = Image.fromarray(np.full((32, 32), 55 * 257, np.uint16))
    assert np.abs(first_pixel(loaded(tmp_path, deep, profile=grey_profile(1.0))) - 128).max() <= 1
    clear = loaded(tmp_path, Image.new("LA", (32, 32), (55, 255)), profile=grey_profile(1.0))
    assert np.abs(first_pixel(clear) - 128).max() <= 1


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_cmyk_profile(name: str, tmp_path: Path) -> None:
    image = loaded(tmp_path, Image.new("CMYK", (32, 32), (255, 0, 0, 0)), name, cmyk_profile((55, -37, -50)))
    assert np.abs(first_pixel(image) - (0, 147, 216)).max() <= 12  # process cyan; without its profile (0, 255, 255)
    assert image.notes == ("colours converted from an ink test to sRGB", "converted from CMYK to RGB")


@pytest.mark.parametrize(
    ("mode", "name", "profile", "note"),
    [
        ("RGB", "a.png", grey_profile(1.0), "the image's colour profile is for GRAY pixels, not for RGB: the profile"),
        ("RGB", "a.png", cmyk_profile((55, 0, 0)), "the image's colour profile is for CMYK pixels, not for RGB"),
        ("CMYK", "a.tif", P3, "the image's colour profile is for RGB pixels, not for CMYK: the profile is ignored"),
        ("LAB", "a.tif", P3, "the image's colour profile is for RGB pixels, not for LAB: the profile is ignored"),
        ("RGB", "a.png", b"no profile", "the image's colour profile: cannot open profile from string: the profile"),
        ("RGB", "a.png", P3[:300], "the image's colour profile: "),
        ("RGB", "a.png", P3.replace(b"rTRC", b"xxxx"), "the image's colour profile: cannot build transform: "),
        ("RGB", "a.png", P3.replace(b"mntrRGB ", b"mntr\x1b[2J"), "the image's colour profile"),
    ],
)  # fmt: skip
def test_a_profile_that_does_not_fit_is_ignored_and_named(
    mode: str, name: str, profile: bytes, note: str, tmp_path: Path
) -> None:
    plain = Image.new(mode, (32, 32), (200, 60, 60, 0)[: len(mode.replace("LAB", "RGB"))])
    image = loaded(tmp_path, plain, name, profile)
    assert image.notes[0].startswith(note)
    assert image.notes[0].isprintable()
    assert image.pixels.tobytes() == loaded(tmp_path, plain, name, None).pixels.tobytes()


def test_a_profiles_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    image = loaded(tmp_path, Image.new("RGB", (32, 32), RED), profile=rgb_profile(DISPLAY_P3, "\x1b[2J\nP3" + "x" * 99))
    assert image.notes[0].startswith("colours converted from [2J P3xxx")
    assert len(image.notes[0]) < 80


@pytest.mark.parametrize(("gamma", "notes"), [(1.0, 1), (1 / 2.2, 0)])
def test_a_pngs_gamma_is_named(gamma: float, notes: int, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    image = load_image(saved(tmp_path, rgb(), pnginfo=chunks))
    assert image.notes == ("the image's gamma of 1 is not applied: colours are taken as sRGB",)[:notes]


@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"not a TIFF", b"II*\0\x08\0\0\0\xff\xff", b""])
def test_damaged_exif_does_not_refuse_a_picture(exif: bytes, tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, rgb(), "a.jpg", exif=b"Exif\0\0" + exif))
    assert image.size == (32, 24)
    assert set(image.notes) <= {"the image's EXIF data is damaged: the image may not be upright"}
