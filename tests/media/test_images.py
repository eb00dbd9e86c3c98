"""Tests real image files: a refusal is one line that names option and file, and notes name each conversion."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.media.profiles import DISPLAY_P3, rgb_profile
from tests.small_files import assert_one_line, rgb, saved
from wanfast.runtime.engine.pixels import fit_image, of_decoded, to_uint8
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media import images
from wanfast.runtime.media.images import LoadedImage, load_image

P3 = rgb_profile(DISPLAY_P3)


def pixel(image: LoadedImage, x: int, y: int) -> object:
    return image.pixels.getpixel((x, y))


# --- refused images


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG that claims a size but has almost no pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 40)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cut(folder: Path, name: str) -> str:
    path = Path(saved(folder, rgb(200, 200), name))
    path.write_bytes(path.read_bytes()[:-2000])
    return str(path)


def without_pixels(folder: Path, name: str) -> str:
    """Saves a picture whose compressed pixels are all zeros; its headers are whole."""
    path = Path(saved(folder, rgb(64, 64), name))
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start].ljust(len(data), b"\0"))
    return str(path)


def file_of(folder: Path, data: bytes) -> str:
    (folder / "file.png").write_bytes(data)
    return str(folder / "file.png")


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda d: str(d / "no.png"), "no such file"),
    "folder": (str, "is a folder"),
    "pipe": (pipe, "is a pipe or a device"),
    "unreadable": (lambda _: "/proc/self/mem", "cannot be read"),
    "name too long": (lambda d: str(d / ("x" * 300)), "cannot be read"),
    "empty": (lambda d: file_of(d, b""), "is empty"),
    "text": (lambda d: file_of(d, b"hello\n" * 99), "not an image"),
    "cut png": (lambda d: cut(d, "cut.png"), "truncated or damaged"),
    "cut jpeg": (lambda d: cut(d, "cut.jpg"), "truncated or damaged"),
    "cut gif": (lambda d: cut(d, "cut.gif"), "truncated or damaged"),
    "cut webp": (lambda d: cut(d, "cut.webp"), "truncated or damaged"),
    "avif without pixels": (lambda d: without_pixels(d, "zeros.avif"), "truncated or damaged"),
    "1x1": (lambda d: saved(d, rgb(1, 1)), "1x1 pixels; use an image of at least 16x16"),
    "15 high": (lambda d: saved(d, rgb(40, 15)), "40x15 pixels"),
    "wide": (lambda d: saved(d, rgb(65, 16)), "65x16 has an aspect ratio above 4:1; crop the image"),
    "tall": (lambda d: saved(d, rgb(16, 65)), "16x65 has an aspect ratio above 4:1; crop the image"),
    "bomb": (
        lambda d: file_of(d, png_header(15000, 12500)),
        "has too many pixels; scale the image to at most 64 megapixels",
    ),
    "large and cut": (lambda d: file_of(d, png_header(9000, 7000)), "truncated or damaged"),
    "not finite": (lambda d: saved(d, Image.new("F", (32, 32), float("nan")), "nan.tif"), "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    path = make(tmp_path)
    with warnings.catch_warnings(), pytest.raises(ConfigError) as caught:
        warnings.simplefilter("error")
        load_image(path)
    assert_one_line(caught.value, "--image", path)
    assert words in str(caught.value)


def test_the_option_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--jobs "):
        load_image(str(tmp_path / "no.png"), option="--jobs")


# --- accepted images


def test_plain_rgb_is_untouched(tmp_path: Path) -> None:
    original = rgb(33, 21)
    path = saved(tmp_path, original)
    image = load_image(path)
    assert (image.notes, image.size) == ((), (33, 21))
    assert image.pixels.tobytes() == original.tobytes()
    assert image.sha256 == subprocess.check_output(["sha256sum", path], text=True).split()[0]


@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 64)])
def test_the_limits_themselves_are_taken(size: tuple[int, int], tmp_path: Path) -> None:
    assert load_image(saved(tmp_path, rgb(*size))).size == size


def peak_of(code: str) -> int:
    """Returns how many bytes a fresh process holds at most while it runs `code`."""
    # not ru_maxrss, which begins with what the process held that started this one
    script = f"{code}\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    root = Path(images.__file__).parents[3]
    return int(subprocess.check_output([sys.executable, "-c", script], cwd=root)) * 1024


@pytest.mark.long
def test_the_largest_images_are_read_in_little_memory(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGBA", (16000, 4000), (9, 9, 9, 99)), compress_level=1, icc_profile=P3)
    load = f"from wanfast.runtime.media.images import load_image; assert load_image({path!r}).size == (16000, 4000)"
    assert peak_of(load) < 2.2e9


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("1", (16000, 4001), 1), compress_level=1)
    with (
        warnings.catch_warnings(),
        pytest.raises(ConfigError, match="has 16000x4001 pixels; scale the image to at most 64 megapixels") as caught,
    ):
        warnings.simplefilter("error")
        load_image(path)
    assert_one_line(caught.value, "--image", path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "film.mkv").open("wb") as file:
        file.truncate(41 * 10**9)
    with pytest.raises(ConfigError, match=r"has 41.0 GB, which is too large for an image; give an image file"):
        load_image(str(tmp_path / "film.mkv"))


@pytest.mark.parametrize(
    ("mode", "fill", "name", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "a.tif", (255, 0, 0)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("L", 77, "a.png", (77, 77, 77)),
        ("YCbCr", (77, 128, 128), "a.tif", (77, 77, 77)),
    ],
)
def test_other_modes_become_rgb(mode: str, fill: object, name: str, expected: object, tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, Image.new(mode, (32, 24), fill), name))  # type: ignore[arg-type]
    assert pixel(image, 5, 5) == expected
    assert image.notes == (f"converted from {mode} to RGB",)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "a.jpg", quality=100))
    assert np.abs(np.array(pixel(image, 5, 5)) - (255, 0, 0)).max() <= 3
    assert image.notes == ("converted from CMYK to RGB",)


def test_palette(tmp_path: Path) -> None:
    palette = Image.new("RGB", (32, 32), (200, 10, 30)).quantize(4)
    assert load_image(saved(tmp_path, palette)).notes == ("converted from P to RGB",)
    assert pixel(load_image(saved(tmp_path, palette)), 3, 3) == (200, 10, 30)
    image = load_image(saved(tmp_path, palette, transparency=palette.getpixel((0, 0))))
    assert image.notes == ("transparent pixels are blended with white",)
    assert pixel(image, 3, 3) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "fill", "expected"),
    [("RGBA", (255, 0, 0, 51), (255, 204, 204)), ("LA", (0, 51), (204, 204, 204)), ("RGBA", (9, 9, 9, 0), (255,) * 3)],
)
def test_alpha_is_blended_with_white(mode: str, fill: tuple[int, ...], expected: object, tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, Image.new(mode, (32, 32), fill)))
    assert pixel(image, 3, 3) == expected
    assert image.notes == ("transparent pixels are blended with white",)


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    original = rgb()
    image = load_image(saved(tmp_path, original.convert("RGBA")))
    assert image.notes == ()
    assert image.pixels.tobytes() == original.tobytes()


@pytest.mark.parametrize(
    ("values", "name", "expected", "span"),
    [
        (np.array([0, 257, 32896, 65535], np.uint16), "a.png", [0, 1, 128, 255], "0..65535"),
        (np.array([0, 257, 32896, 65535], np.uint16), "a.tif", [0, 1, 128, 255], "0..65535"),
        (np.array([0, 257, 32896, 65535], np.int32), "a.tif", [0, 1, 128, 255], "0..65535"),
        (np.array([-100, 0, 100, 410], np.int32), "a.tif", [0, 50, 100, 255], "-100..410"),
        (np.array([0.0, 0.2, 0.5, 1.0], np.float32), "a.tif", [0, 51, 128, 255], "0..1"),
        (np.array([0.0, 51.0, 128.0, 255.0], np.float32), "a.tif", [0, 51, 128, 255], "0..255"),
    ],
)
def test_deep_grey_is_scaled_not_clipped(
    values: np.ndarray, name: str, expected: list[int], span: str, tmp_path: Path
) -> None:
    deep = Image.fromarray(np.tile(values.repeat(8), (16, 1)))
    image = load_image(saved(tmp_path, deep, name))
    assert np.array(image.pixels)[3, ::8, 0].tolist() == expected
    assert image.notes == (f"mode {deep.mode} scaled to 8 bits: {span} to 0..255", "converted from L to RGB")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_exif_orientation_turns_the_pixels(name: str, tmp_path: Path) -> None:
    stored = Image.new("RGB", (48, 32), "black")
    stored.paste("white", (0, 0, 16, 16))  # top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    image = load_image(saved(tmp_path, stored, name, exif=exif))
    assert image.size == (32, 48)
    corners = [np.mean(pixel(image, x, y)) > 128 for x, y in [(4, 4), (27, 4), (4, 43), (27, 43)]]
    assert corners == [False, True, False, False]  # top right when upright
    assert image.notes == ("the image was turned upright (EXIF orientation 6)",)


def test_first_frame_of_a_gif(tmp_path: Path) -> None:
    colours = ["red", "green", "blue"]
    first, *others = [Image.new("RGB", (32, 32), colour) for colour in colours]
    image = load_image(saved(tmp_path, first, "a.gif", save_all=True, append_images=others))
    assert pixel(image, 3, 3) == (255, 0, 0)
    assert image.notes[0] == "the image file has 3 frames: only the first is used"


def test_heic_without_the_extra_names_the_extra(tmp_path: Path) -> None:
    """A fresh process is asked, because an opener stays registered."""
    path = saved(tmp_path, rgb(64, 64), "a.heic")
    script = (
        "import sys; sys.modules['pillow_heif'] = None; from wanfast.runtime.media.images import load_image;"
        f"load_image({path!r})"
    )
    root = Path(images.__file__).parents[3]
    refused = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert refused.stderr.splitlines()[-1].endswith(
        f"--image {path}: is a HEIC image; run `pip install 'wanfast[heic]'`, or save it as JPEG"
    )


# --- tensors


def test_fit_image_is_the_references_expression(tmp_path: Path) -> None:
    original = rgb(97, 61)
    tensor = torch.tensor(np.array(original)).permute(2, 0, 1) / 255
    tensor = (tensor - 0.5) / 0.5
    expected = torch.nn.functional.interpolate(
        tensor[None], size=(48, 80), mode="bicubic", align_corners=False, antialias=False
    )[0]
    fitted = fit_image(load_image(saved(tmp_path, original)).pixels, width=80, height=48)
    assert fitted.shape == (3, 48, 80)
    assert (fitted.dtype, fitted.device.type) == (torch.float32, "cpu")
    assert torch.equal(fitted, expected)


def test_fit_image_keeps_the_overshoot(tmp_path: Path) -> None:
    edge = Image.new("RGB", (32, 32), "black")
    edge.paste("white", (16, 0, 32, 32))
    fitted = fit_image(load_image(saved(tmp_path, edge)).pixels, width=160, height=160)
    assert fitted.max() > 1.05
    assert fitted.min() < -1.05


def test_crop_scales_the_middle() -> None:
    image = rgb(100, 40)
    expected = fit_image(image.crop((30, 0, 70, 40)), width=64, height=64)
    assert torch.equal(fit_image(image, width=64, height=64, fit="crop"), expected)


def test_pad_scales_the_whole_and_adds_black() -> None:
    image = rgb(100, 40)
    padded = fit_image(image, width=64, height=48, fit="pad")
    assert padded.shape == (3, 48, 64)
    assert torch.equal(padded[:, 11:37], fit_image(image, width=64, height=26))
    assert (padded[:, :11] == -1).all() and (padded[:, 37:] == -1).all()
    assert torch.equal(fit_image(image.rotate(90, expand=True), 48, 64, "pad")[:, :, :11], -torch.ones(3, 64, 11))


def test_frames_are_clamped_then_truncated() -> None:
    values = torch.tensor([-7.0, -1.0, -1 + 2 * 0.999 / 255, 0.0, 1 - 2 * 0.001 / 255, 1.0, 7.0])
    video = values.expand(3, 2, 1, 7).clone()
    video[1:] = -1
    frames = to_uint8(video)
    assert (frames.shape, frames.dtype) == ((2, 1, 7, 3), np.uint8)
    assert frames[1, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert not frames[..., 1:].any()
    assert video[0, 0, 0, 0] == -7  # the argument is unchanged


def test_a_decoded_frame_stands_for_the_middle_of_the_values_that_were_truncated() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(to_uint8(of_decoded(every)[:, None])[0], every)
    video = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (frame,) = to_uint8(video)
    level = 2 / 255
    assert float((of_decoded(frame) - video[:, 0]).mean()) == pytest.approx(0, abs=0.01 * level)
    assert float((of_decoded(frame) - video[:, 0]).abs().max()) <= 0.501 * level
    assert of_decoded(np.full((1, 1, 3), 255, np.uint8)).tolist() == [[[1.0]]] * 3


# --- the parent process


def test_reading_and_checking_import_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from wanfast.runtime.media import images, video_file;"
        "assert not {'PIL', 'numpy', 'av', 'torch'} & set(sys.modules);"
        f"images.load_image({saved(tmp_path, Image.new('I;16', (32, 32)))!r});"
        f"video_file.check_outputs({str(tmp_path / 'out.mp4')!r}, overwrite=False, needed_bytes=0);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(images.__file__).parents[3])
