"""Tests which videos can be continued, and that their pixels are read as they were written."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

import wanfast
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media import earlier_video
from wanfast.runtime.media.earlier_video import earlier_frames, load_earlier
from wanfast.runtime.media.video_file import Mp4Writer

CAT = Path(wanfast.__file__).parent / "assets/examples/cat.jpg"


def write(file: Path, width: int, height: int, *, num_frames: int = 3, fps: int = 16) -> Path:
    """Writes a video as ours are, of smooth frames that differ."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([x + 8 * n, y + 60, np.full_like(x, 20 * n)], axis=2) for n in range(num_frames)]
    with Mp4Writer(file, fps) as writer:
        writer.add(np.stack(frames).astype(np.uint8))
    return file


def silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
    frame.sample_rate = 44100
    return frame


def test_size_rate_frames_and_last_pixels_are_read(tmp_path: Path) -> None:
    video = load_earlier(str(write(tmp_path / "a.mp4", 64, 48, num_frames=5, fps=12)))
    assert (video.size, video.fps, video.num_frames, video.notes) == ((64, 48), 12, 5, ())
    frames = np.stack([*earlier_frames(str(tmp_path / "a.mp4"))])
    assert (np.array(video.pixels) == frames[-1]).all() and frames.shape == (5, 48, 64, 3)
    assert np.abs(frames[-1, :, :, 2].astype(int) - 80).mean() < 3


@pytest.mark.parametrize(
    ("matrix", "height", "by"), [(1, 48, 1), (6, 48, 5), (2, 48, 5), (2, 720, 1), (6, 720, 5)], ids=str
)
def test_the_matrix_of_colours_is_the_files_own(tmp_path: Path, matrix: int, height: int, by: int) -> None:
    """A file that names none is read as players do: BT.709 (1) from 720 lines on, else BT.601 (5)."""
    file, rgb = tmp_path / "a.mp4", np.full((height, 64, 3), (200, 60, 30), np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1", "colorspace": str(matrix)})
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        yuv = frame.reformat(format="yuv420p", dst_colorspace=by, dst_color_range=1)
        container.mux(stream.encode(yuv))
        container.mux(stream.encode())
    (read,) = earlier_frames(str(file))
    assert np.abs(read.astype(int) - rgb).max() <= 3


def test_colours_do_not_drift_over_generations_of_continued_videos(tmp_path: Path) -> None:
    """Each generation is read from a file and written again. docs/kinds.md states the printed figures."""
    file, photograph = tmp_path / "a.mp4", np.asarray(Image.open(CAT).convert("RGB").resize((480, 320)))
    first = frames = np.stack([photograph[16:-16, 2 * n + 16 : 2 * n + 464] for n in range(8)])  # a camera that pans
    drift = []
    for _ in range(8):
        with Mp4Writer(file, 16) as writer:
            writer.add(frames)
        frames = np.stack([*earlier_frames(str(file))])
        drift.append((frames.astype(float) - first).mean(axis=(0, 1, 2)))
    print("mean of red, green, blue minus the original's, of 255:")
    print(*(f"after {n + 1}: {', '.join(f'{value:+.2f}' for value in drift[n])}" for n in (0, 7)), sep="\n")
    assert np.abs(drift[0]).max() < 0.3 and np.abs(drift[7]).max() < 1


def test_what_no_clip_can_continue_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole.mp4", 64, 48)
    cut, text, odd, slow, sound = (tmp_path / f"{name}.mp4" for name in ("cut", "text", "odd", "slow", "sound"))
    cut.write_bytes(whole.read_bytes()[:500])
    text.write_text("no video")
    write(odd, 66, 48)
    with av.open(str(slow), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux(stream.encode(silence()))
        container.mux(stream.encode())
    for file, words in {
        sound: "holds no frames: give a complete mp4 file",
        tmp_path: "no such file; check the path",
        tmp_path / "none.mp4": "no such file; check the path",
        cut: "give a complete mp4 file",
        text: "give a complete mp4 file",
        odd: "has 66x48 pixels, but the sides of a clip are multiples of 16: scale the file first, for example with "
        "`ffmpeg -i OLD.mp4 -vf scale=64:48 NEW.mp4`",
        slow: "has 29.97 frames per second, not a whole number up to 240: convert the file first",
    }.items():
        with pytest.raises(ConfigError, match="--continue-from") as refused:
            load_earlier(str(file))
        assert str(refused.value).startswith(f"--continue-from {file}: ") and words in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"a\.mp4: players turn it by 90 degrees: turn the pixels first"):
        earlier_video._check(SimpleNamespace(width=64, height=48, rotation=-90), None, "a.mp4")
    monkeypatch.setattr(earlier_video, "MOST_FRAMES", 2)
    with pytest.raises(ConfigError, match="has over 2 frames: give a file with only the last part of this video"):
        load_earlier(str(whole))


def encoded(
    file: Path,
    size: tuple[int, int] = (64, 48),
    *,
    shape: Fraction | None = None,
    times: Sequence[int] = range(3),
    pixels: str = "yuv420p",
    **options: str,
) -> Path:
    """Writes a video of another program, 16 frames a second; `shape`: of its pixels."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=16, options=options)
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        if shape is not None:
            stream.sample_aspect_ratio = shape
        for time in times:
            frame = av.VideoFrame(*size, pixels)
            frame.pts, frame.time_base = time, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def test_what_would_look_otherwise_is_refused(tmp_path: Path) -> None:
    """Such a video can be decoded, but its continuation would show its frames pale, stretched or at other times."""
    hdr = {"color_trc": "smpte2084", "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    for file, words in {
        encoded(
            tmp_path / "hdr.mp4", pixels="yuv420p10le", **hdr
        ): "is an HDR video, whose colours would look pale: convert the file",
        encoded(
            tmp_path / "wide.mp4", shape=Fraction(4, 3)
        ): "its pixels are not square (4/3), so players stretch the video",
        encoded(tmp_path / "late.mp4", times=(0, 1, 2, 3, 4, 11)): "has a frame rate that varies",
        both(tmp_path): "its frames change from 64x48 to 96x64 pixels: give a file whose frames have one size",
    }.items():
        with pytest.raises(ConfigError) as refused:
            load_earlier(str(file))
        assert str(refused.value).startswith(f"--continue-from {file}: ") and words in str(refused.value)
    assert load_earlier(str(encoded(tmp_path / "ten.mp4", pixels="yuv420p10le"))).num_frames == 3
    assert load_earlier(str(encoded(tmp_path / "square.mp4", shape=Fraction(1)))).num_frames == 3


def both(folder: Path) -> Path:
    """Writes a stream whose frames change their size."""
    parts = [encoded(folder / "a.h264"), encoded(folder / "b.h264", (96, 64))]
    (folder / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / "both.h264"


def test_sound_is_left_out_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream, sound = container.add_stream("libx264", rate=16), container.add_stream("aac", rate=44100)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
        container.mux(sound.encode(silence()))
        container.mux(sound.encode())
    assert load_earlier(str(file)).notes == ("--continue-from: the sound of the earlier video is left out",)
