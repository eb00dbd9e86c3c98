"""Tests real videos and contact sheets, and what is refused before one is made."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.small_files import RNG, assert_one_line, names_in
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media import video_file
from wanfast.runtime.media.video_file import Mp4Writer, check_outputs, frames_of_sheet, write_contact_sheet
from wanfast.runtime.store.atomic import atomic_paths


def smooth_clip(frames: int = 17, height: int = 96, width: int = 160) -> np.ndarray:
    """Returns [F, H, W, 3]: drifting colour waves."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 30 + t / 9), np.cos(y / 25 + t / 7), np.sin((x + y) / 40 - t / 8)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def write_mp4(clip: np.ndarray, path: Path, fps: int) -> None:
    """Writes all frames of a clip at once."""
    with Mp4Writer(path, fps) as writer:
        writer.add(clip)


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


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [17], [5, 12]], ids=str)
def test_frames_that_come_a_few_at_a_time_give_the_same_bytes(tmp_path: Path, sizes: list[int]) -> None:
    clip = smooth_clip()
    write_mp4(clip, tmp_path / "whole.mp4", fps=16)
    with Mp4Writer(tmp_path / "parts.mp4", fps=16) as writer:
        for part in np.split(clip, np.cumsum(sizes)[:-1]):
            writer.add(part)
    assert (tmp_path / "parts.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_frames_are_encoded_while_the_next_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, make_frame = threading.Event(), av.VideoFrame.from_ndarray

    def make(array: np.ndarray, format: str) -> av.VideoFrame:
        encoded.set()
        return make_frame(array, format=format)

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", make)
    with Mp4Writer(tmp_path / "a.mp4", fps=16) as writer:
        writer.add(smooth_clip(1))
        assert encoded.wait(10)  # before the end, and without another frame


def test_an_encoder_that_fails_is_told_with_the_next_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(array: np.ndarray, format: str) -> av.VideoFrame:
        raise av.error.MemoryError(12, "no memory")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fails)
    with pytest.raises(OSError, match="no memory"), Mp4Writer(tmp_path / "a.mp4", fps=16) as writer:
        for _ in range(200):
            writer.add(smooth_clip(1))
            time.sleep(0.01)
        pytest.fail("all frames were accepted")


def test_mp4_encoder_settings(tmp_path: Path) -> None:
    write_mp4(smooth_clip(5), tmp_path / "clip.mp4", fps=16)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert b"crf=10.0 " in data
    assert data.index(b"moov") < data.index(b"mdat")


FLAT = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 0, 0),
    (255, 255, 255),
    (200, 60, 60),
    (13, 97, 210),
    (240, 200, 170),
]
SIZES = [(64, 64), (480, 832), (720, 1280)]


def boxes(data: bytes) -> dict[str, bytes]:
    """Returns the body of each innermost box of an mp4, by its path; a sample entry has 78 bytes before its boxes."""
    before = {"moov": 0, "trak": 0, "mdia": 0, "minf": 0, "stbl": 0, "stsd": 8, "avc1": 78}
    found: dict[str, bytes] = {}
    while len(data) >= 8:
        size, name = int.from_bytes(data[:4], "big"), data[4:8].decode("latin-1")
        body, data = data[8:size], data[size:]
        inner = boxes(body[before[name] :]) if name in before else {"": body}
        found |= {f"{name}/{path}".rstrip("/"): value for path, value in inner.items()}
    return found


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mp4_names_its_colours_at_every_size(height: int, width: int, tmp_path: Path) -> None:
    write_mp4(np.zeros((2, height, width, 3), np.uint8), tmp_path / "a.mp4", fps=16)
    colr = boxes((tmp_path / "a.mp4").read_bytes())["moov/trak/mdia/minf/stbl/stsd/avc1/colr"]
    assert colr == b"nclx" + struct.pack(">HHHB", 1, 1, 1, 0)  # primaries, transfer and matrix BT.709, limited range
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context  # these come from the H.264 stream itself
        next(container.decode(video=0))
        tags = (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)
    assert tags == (1, 1, 1, 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_another_program_shows_the_same_colours(height: int, width: int, tmp_path: Path) -> None:
    """The program is another build of ffmpeg, told nothing; to round, not to cut off, is asked of its conversion."""
    clip = np.broadcast_to(np.array(FLAT, np.uint8)[:, None, None], (len(FLAT), height, width, 3))
    write_mp4(np.ascontiguousarray(clip), tmp_path / "flat.mp4", fps=16)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "flat.mp4"]
    command += ["-sws_flags", "accurate_rnd+full_chroma_int", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    shown = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    assert np.abs(shown.reshape(clip.shape).astype(int) - clip).max() <= 2


def test_mp4_is_deterministic(tmp_path: Path) -> None:
    """The file does not depend on the heap's content or the number of cores; x264's default output depends on both."""
    clip = smooth_clip(9, 480, 832) + RNG.integers(0, 20, (9, 480, 832, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", clip)
    script = (
        "import os, sys, numpy, pathlib; from wanfast.runtime.media.video_file import Mp4Writer;"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])\n"
        "with Mp4Writer(pathlib.Path(sys.argv[2]), fps=16) as writer: writer.add(numpy.load('clip.npy'))"
    )
    root = str(Path(video_file.__file__).parents[3])
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


@pytest.mark.parametrize("kind", [av.error.MemoryError, av.error.ExternalError, av.error.UnknownError])
def test_what_libav_reports_is_one_line(
    kind: type[av.FFmpegError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(array: np.ndarray, format: str) -> av.VideoFrame:
        raise kind(1, "no more room")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fails)
    with pytest.raises(ConfigError, match="no more room") as caught, atomic_paths(tmp_path / "out.mp4") as (partial,):
        write_mp4(smooth_clip(1), partial, fps=16)
    assert_one_line(caught.value, "--output", tmp_path / "out.mp4")


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert frames_of_sheet(num_frames) == shown
    write_contact_sheet(frames[shown], tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    columns = min(4, len(shown))
    assert sheet.shape == (8 * -(-len(shown) // columns), 16 * columns, 3)
    assert (sheet[::8, ::16, 0] - 100).ravel().tolist() == shown
    assert names_in(tmp_path) == ["sheet.png"]


# --- check_outputs


def test_check_output_takes_a_good_path(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    check_outputs(str(target), overwrite=False, needed_bytes=1000)
    assert names_in(tmp_path) == []
    target.write_bytes(b"old")
    check_outputs(str(target), overwrite=True, needed_bytes=1000)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.avi", "must end in .mp4"),
        ("out", "must end in .mp4"),
        ("no/such/out.mp4", "run `mkdir -p {folder}/no/such`"),
        ("file/out.mp4", "{folder}/file is a file, not a folder"),
        ("folder", "is a folder; give an .mp4 file in it"),
        ("x" * 250 + ".mp4", "File name too long"),
        ("/proc/out.mp4", "cannot be written"),
        ("no/my dir/out.mp4", "run `mkdir -p '{folder}/no/my dir'`"),
        ("old.mp4", "exists; choose another name or add --overwrite"),
        ("dangling.mp4", "exists; choose another name or add --overwrite"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_check_output_refuses(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nothing")
    before, path = names_in(tmp_path), str(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        check_outputs(path, overwrite=False, needed_bytes=0)
    assert_one_line(caught.value, "--output", path)
    assert words.format(folder=tmp_path) in str(caught.value)
    assert names_in(tmp_path) == before


def test_check_output_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_outputs(str(tmp_path / "folder.mp4"), overwrite=True, needed_bytes=0)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_files_beside_the_video_are_checked_too(suffix: str, overwrite: bool, tmp_path: Path) -> None:
    video, beside = tmp_path / "out.mp4", [tmp_path / "out.json", tmp_path / "out.png"]
    video.with_suffix(suffix).mkdir()
    with pytest.raises(ConfigError, match=rf"out{suffix}, written beside the video, is a folder") as caught:
        check_outputs(str(video), *beside, overwrite=overwrite, needed_bytes=0)
    assert_one_line(caught.value, "--output", video)
    video.with_suffix(suffix).rmdir()
    video.with_suffix(suffix).touch()
    if overwrite:
        check_outputs(str(video), *beside, overwrite=True, needed_bytes=0)
    else:
        with pytest.raises(ConfigError, match=rf"out{suffix}, written beside the video, already exists"):
            check_outputs(str(video), *beside, overwrite=False, needed_bytes=0)


def test_check_outputs_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "out.mp4")
    with pytest.raises(ConfigError, match=r"needs 1000000000.0 GB and .* free some space") as caught:
        check_outputs(path, overwrite=False, needed_bytes=10**18)
    assert_one_line(caught.value, "--output", path)
    monkeypatch.setattr(video_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_400))
    with pytest.raises(ConfigError, match=r"needs 5.6 MB and .* has 3.4 kB free"):
        check_outputs(path, overwrite=False, needed_bytes=5_600_000)
