"""Tests real input and output files: a refusal is one line that names option and file; failures leave no file."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from wanfast.runtime.engine.pixels import fit_image, to_uint8
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media import media_io
from wanfast.runtime.media.media_io import (
    LoadedImage,
    check_output,
    load_image,
    write_contact_sheet,
    write_mp4,
)
from wanfast.runtime.store.atomic import atomic_paths

RNG = np.random.default_rng(0)


def rgb(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def pixel(image: LoadedImage, x: int, y: int) -> object:
    return image.pixels.getpixel((x, y))


def smooth_clip(frames: int = 17, height: int = 96, width: int = 160) -> np.ndarray:
    """Returns [F, H, W, 3]: drifting colour waves."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 30 + t / 9), np.cos(y / 25 + t / 7), np.sin((x + y) / 40 - t / 8)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def assert_one_line(error: ConfigError, option: str, path: object) -> None:
    assert error.exit_code == 2
    assert str(error).startswith(f"{option} {path}: ")
    assert "\n" not in str(error)


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
    "1x1": (lambda d: saved(d, rgb(1, 1)), "1x1 pixels; use an image of at least 16x16"),
    "15 high": (lambda d: saved(d, rgb(40, 15)), "40x15 pixels"),
    "wide": (lambda d: saved(d, rgb(65, 16)), "65x16 is longer than 4:1; crop it"),
    "tall": (lambda d: saved(d, rgb(16, 65)), "16x65 is longer than 4:1; crop it"),
    "bomb": (lambda d: file_of(d, png_header(15000, 12500)), "megapixels; scale it down"),
    "large and cut": (lambda d: file_of(d, png_header(10000, 9500)), "truncated or damaged"),
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


def test_20000_pixels_wide(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("1", (20000, 5000), 1), compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(path)
    assert image.size == (20000, 5000)
    assert pixel(image, 19999, 4999) == (255, 255, 255)


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
    assert image.notes == ("turned upright (EXIF orientation 6)",)


def test_first_frame_of_a_gif(tmp_path: Path) -> None:
    colours = ["red", "green", "blue"]
    first, *others = [Image.new("RGB", (32, 32), colour) for colour in colours]
    image = load_image(saved(tmp_path, first, "a.gif", save_all=True, append_images=others))
    assert pixel(image, 3, 3) == (255, 0, 0)
    assert image.notes[0] == "the first of 3 frames is used"


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


def test_frames_are_clamped_then_truncated() -> None:
    values = torch.tensor([-7.0, -1.0, -1 + 2 * 0.999 / 255, 0.0, 1 - 2 * 0.001 / 255, 1.0, 7.0])
    video = values.expand(3, 2, 1, 7).clone()
    video[1:] = -1
    frames = to_uint8(video)
    assert (frames.shape, frames.dtype) == ((2, 1, 7, 3), np.uint8)
    assert frames[1, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert not frames[..., 1:].any()
    assert video[0, 0, 0, 0] == -7  # the argument is unchanged


# --- mp4 and contact sheet


def test_mp4_round_trip(tmp_path: Path) -> None:
    clip, path = smooth_clip(), tmp_path / "clip.mp4"
    write_mp4(clip, path, fps=16)
    read = iio.imread(path, plugin="pyav")
    assert read.shape == clip.shape
    error = np.mean((read.astype(float) - clip) ** 2)
    assert 10 * np.log10(255**2 / error) > 35
    meta = iio.immeta(path, plugin="pyav")
    assert (meta["fps"], meta["codec"], meta["video_format"]) == (16, "h264", "yuv420p")
    assert meta["duration"] == pytest.approx(17 / 16)
    assert names_in(tmp_path) == ["clip.mp4"]


def test_mp4_encoder_settings(tmp_path: Path) -> None:
    write_mp4(smooth_clip(5), tmp_path / "clip.mp4", fps=16)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert b"crf=10.0 " in data
    assert data.index(b"moov") < data.index(b"mdat")


def test_mp4_colour_matrix_is_the_one_it_names(tmp_path: Path) -> None:
    import av

    write_mp4(np.full((2, 64, 64, 3), (255, 0, 0), np.uint8), tmp_path / "red.mp4", fps=16)
    with av.open(str(tmp_path / "red.mp4")) as container:
        frame = next(container.decode(video=0))
        luma = np.frombuffer(frame.planes[0], np.uint8)[0]
    assert luma == pytest.approx(16 + 219 * 0.299, abs=1.5)  # BT.601; BT.709 would give 62.6
    assert (frame.colorspace, frame.color_range) == (6, 1)  # SMPTE 170M, limited


def test_mp4_is_deterministic(tmp_path: Path) -> None:
    """The file does not depend on the heap's content or the number of cores; x264's default output depends on both."""
    clip = smooth_clip(9, 480, 832) + RNG.integers(0, 20, (9, 480, 832, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", clip)
    script = (
        "import os, sys, numpy, pathlib; from wanfast.runtime.media.media_io import write_mp4;"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]);"
        "write_mp4(numpy.load('clip.npy'), pathlib.Path(sys.argv[2]), fps=16)"
    )
    root = str(Path(media_io.__file__).parents[3])
    for cores, heap_fill in [("1", "85"), ("2", "85"), ("2", "170")]:
        environment = os.environ | {"PYTHONPATH": root, "MALLOC_PERTURB_": heap_fill}
        command = [sys.executable, "-c", script, cores, f"{cores}-{heap_fill}.mp4"]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    write_mp4(clip, tmp_path / "here.mp4", fps=16)
    assert len({path.read_bytes() for path in tmp_path.glob("*.mp4")}) == 1
    assert len(list(tmp_path.glob("*.mp4"))) == 4


def write_with_little_room(folder: Path, limit: int) -> None:
    """Writes in a child whose files may grow to `limit` bytes; the exit code reports if the refusal was correct."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    noise = np.random.default_rng(0).integers(0, 256, (9, 96, 160, 3), dtype=np.uint8)
    for write in (lambda path: write_mp4(noise, path, fps=16), lambda path: write_contact_sheet(noise, path)):
        with pytest.raises(ConfigError) as caught, atomic_paths(folder / "out.mp4") as (partial,):
            write(partial)
        assert_one_line(caught.value, "--output", folder / "out.mp4")
        assert "File too large" in str(caught.value)
        assert "GB free" in str(caught.value)
    os._exit(42)


@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_disk_full(limit: int, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")
    child = multiprocessing.get_context("spawn").Process(target=write_with_little_room, args=(tmp_path, limit))
    child.start()
    child.join()
    assert child.exitcode == 42
    assert names_in(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    make_frame, calls = av.VideoFrame.from_ndarray, []

    def interrupted_late(array: np.ndarray, format: str) -> av.VideoFrame:
        calls.append(names_in(tmp_path))
        if len(calls) == 80:
            raise KeyboardInterrupt
        return make_frame(array, format=format)

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupted_late)
    with pytest.raises(KeyboardInterrupt), atomic_paths(tmp_path / "out.mp4") as (partial,):
        write_mp4(smooth_clip(81, 32, 32), partial, fps=16)
    assert calls[-1] == [f".out.mp4.{os.getpid()}.part"]  # past the encoder's look-ahead, so the file was already begun
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("num_frames", "shown"), [(81, [0, 11, 22, 34, 45, 57, 68, 80]), (3, [0, 1, 2]), (1, [0])])
def test_contact_sheet(num_frames: int, shown: list[int], tmp_path: Path) -> None:
    frames = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 16, 3), np.uint8) + 100
    write_contact_sheet(frames, tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    columns = min(4, len(shown))
    assert sheet.shape == (8 * -(-len(shown) // columns), 16 * columns, 3)
    assert (sheet[::8, ::16, 0] - 100).ravel().tolist() == shown
    assert names_in(tmp_path) == ["sheet.png"]


# --- atomic_paths and check_output


def test_atomic_paths_replaces_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_paths(target) as (partial,):
        partial.write_text("new")
        assert (target.read_text(), partial.parent, partial.name[0]) == ("old", tmp_path, ".")
    assert target.read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_paths(target) as (partial,):
        partial.write_text("never")
        raise ZeroDivisionError
    assert target.read_text() == "new"
    assert names_in(tmp_path) == ["a.json"]


def test_atomic_paths_come_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "a.json"
    with pytest.raises(ConfigError, match="meanwhile"), atomic_paths(first, second, overwrite=False) as partials:
        for partial in partials:
            partial.write_text("new")
        second.write_text("another program's")
    assert names_in(tmp_path) == ["a.json"]
    with pytest.raises(ConfigError), atomic_paths(first, second) as partials:
        partials[0].write_text("new")  # the second file is never written
    assert names_in(tmp_path) == ["a.json"]
    with atomic_paths(first, second) as partials:
        for partial in partials:
            partial.write_text("new")
    assert (first.read_text(), second.read_text(), names_in(tmp_path)) == ("new", "new", ["a.json", "a.mp4"])


def test_atomic_paths_when_the_folder_went_away(tmp_path: Path) -> None:
    target = tmp_path / "gone" / "a.json"
    with pytest.raises(ConfigError) as caught, atomic_paths(target, option="--report") as (partial,):
        partial.write_text("x")
    assert_one_line(caught.value, "--report", target)


def test_check_output_takes_a_good_path(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    assert check_output(str(target), overwrite=False, needed_bytes=1000) == target
    assert names_in(tmp_path) == []
    target.write_bytes(b"old")
    assert check_output(str(target), overwrite=True, needed_bytes=1000) == target
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.avi", "must end in .mp4"),
        ("out", "must end in .mp4"),
        ("no/such/out.mp4", "make it with `mkdir -p {folder}/no/such`"),
        ("file/out.mp4", "Not a directory"),
        ("x" * 250 + ".mp4", "File name too long"),
        ("/proc/out.mp4", "cannot be written"),
        ("old.mp4", "exists; choose another name or add --overwrite"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_check_output_refuses(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    before, path = names_in(tmp_path), str(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        check_output(path, overwrite=False, needed_bytes=0)
    assert_one_line(caught.value, "--output", path)
    assert words.format(folder=tmp_path) in str(caught.value)
    assert names_in(tmp_path) == before


def test_check_output_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_output(str(tmp_path / "folder.mp4"), overwrite=True, needed_bytes=0)


def test_check_output_needs_room(tmp_path: Path) -> None:
    path = str(tmp_path / "out.mp4")
    with pytest.raises(ConfigError, match=r"needs 1000000000.0 GB and .* free some space") as caught:
        check_output(path, overwrite=False, needed_bytes=10**18)
    assert_one_line(caught.value, "--output", path)


# --- the parent process


def test_reading_and_checking_import_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from wanfast.runtime.media import media_io as m;"
        "assert not {'PIL', 'numpy', 'av', 'torch'} & set(sys.modules);"
        f"m.load_image({saved(tmp_path, Image.new('I;16', (32, 32)))!r});"
        f"m.check_output({str(tmp_path / 'out.mp4')!r}, overwrite=False, needed_bytes=0);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(media_io.__file__).parents[3])
