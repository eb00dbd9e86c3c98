"""Reads the video that a new clip continues: its frames, its size and its frames per second.

PyAV decodes this video; PyAV also writes our videos. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.runtime.errors import ConfigError, foreign
from wanfast.runtime.media.images import LoadedImage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OPTION = "--continue-from"
_WHOLE = "give a complete mp4 file"
MOST_FRAMES = 2400  # 6.6 GB of pixels at 1280x720
_SIDE = 16  # pixels: sides are multiples of one token
_UNNAMED = 2  # the number of a file that does not name the matrix of its colours
_HD_HEIGHT = 720  # players take such a video for BT.709 from this height on, else for BT.601
_HDR = (16, 18)  # the numbers of the curves of brightness PQ and HLG


@dataclass(frozen=True, kw_only=True)
class EarlierVideo(LoadedImage):
    """This class holds an earlier video's last frame, number of frames and frame rate."""

    num_frames: int
    fps: int


def load_earlier(path: str) -> EarlierVideo:
    """Decodes an earlier video, and returns its last frame, number of frames and frame rate.

    Raises ConfigError for a file that PyAV cannot decode, and for a video that no clip can continue. Such a video has
    one of these properties: a side is not a multiple of 16 pixels; the size changes; the pixels are not square; the
    video is HDR; the frame rate is not a whole number from 1 to 240; the frame rate changes; the file tells players to
    rotate the video; there are more than MOST_FRAMES frames.
    """
    from PIL import Image

    subject = f"{OPTION} {path}"
    digest = _sha256(Path(path), subject)
    last, times = None, []
    with _opened(path, subject) as container:
        fps = float(container.streams.video[0].average_rate or 0)
        notes = (f"{OPTION}: the sound of the earlier video is left out",) if container.streams.audio else ()
        for last in _decoded(container, subject):
            times.append(last.time)
    if last is None:
        raise ConfigError(f"{subject}: holds no frames: {_WHOLE}")
    _check_rate(fps, times, subject)
    pixels = Image.fromarray(_rgb(last, subject))
    return EarlierVideo(pixels=pixels, sha256=digest, notes=notes, num_frames=len(times), fps=int(fps))


def earlier_frames(path: str) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields the frames [H, W, 3] of an earlier video, as 8-bit RGB.

    Raises ConfigError like `load_earlier`, but does not check the frame rate.
    """
    subject = f"{OPTION} {path}"
    with _opened(path, subject) as container:
        for frame in _decoded(container, subject):
            yield _rgb(frame, subject)


def _sha256(file: Path, subject: str) -> str:
    with foreign(subject, fix := "give an mp4 file that can be read"):
        is_file = file.is_file()
    if not is_file:
        raise ConfigError(f"{subject}: no such file; check the path")
    with foreign(subject, fix), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _opened(path: str, subject: str) -> Any:
    """Returns a container of PyAV that has a video. Raises ConfigError."""
    import av

    with foreign(subject, _WHOLE):
        container = av.open(path)
    if not container.streams.video:
        container.close()
        raise ConfigError(f"{subject}: holds no frames: {_WHOLE}")
    return container


def _decoded(container: Any, subject: str) -> Iterator[Any]:
    """Yields PyAV's frames of a video one after the other. Raises ConfigError."""
    frames, shape = container.decode(video=0), container.streams.video[0].sample_aspect_ratio
    first = None
    for _ in range(MOST_FRAMES + 1):
        with foreign(subject, _WHOLE):
            frame = next(frames, None)
        if frame is None:
            return
        if first is None:
            first = frame
            _check(frame, shape, subject)
        if (frame.width, frame.height) != (first.width, first.height):
            raise ConfigError(
                f"{subject}: its frames change from {first.width}x{first.height} to {frame.width}x{frame.height} "
                "pixels: give a file whose frames have one size"
            )
        yield frame
    raise ConfigError(f"{subject}: has over {MOST_FRAMES} frames: give a file with only the last part of this video")


def _check(frame: Any, shape_of_pixels: Fraction | None, subject: str) -> None:
    """Raises ConfigError if no clip can continue a video that begins with this frame."""
    if frame.width % _SIDE or frame.height % _SIDE:
        near = ":".join(str(max(_SIDE, round(side / _SIDE) * _SIDE)) for side in (frame.width, frame.height))
        raise ConfigError(
            f"{subject}: has {frame.width}x{frame.height} pixels, but the sides of a clip are multiples of {_SIDE}: "
            f"scale the file first, for example with `ffmpeg -i OLD.mp4 -vf scale={near} NEW.mp4`"
        )
    if frame.rotation:
        raise ConfigError(
            f"{subject}: players turn it by {abs(frame.rotation)} degrees: turn the pixels first, for example with "
            "`ffmpeg -i OLD.mp4 NEW.mp4`"
        )
    if shape_of_pixels not in (None, 0, 1):
        raise ConfigError(
            f"{subject}: its pixels are not square ({shape_of_pixels}), so players stretch the video: scale the file "
            "first, for example with `ffmpeg -i OLD.mp4 -vf scale=832:480,setsar=1 NEW.mp4`"
        )
    if frame.color_trc in _HDR:
        raise ConfigError(f"{subject}: is an HDR video, whose colours would look pale: convert the file to SDR first")


def _check_rate(fps: float, times: list[float | None], subject: str) -> None:
    """Raises ConfigError if the rate is no whole number, or the frames with these `times` do not follow evenly."""
    fix = "convert the file first, for example with `ffmpeg -i OLD.mp4 -r 16 NEW.mp4`"
    if fps != int(fps) or not 1 <= fps <= 240:
        raise ConfigError(f"{subject}: has {fps:.5g} frames per second, not a whole number up to 240: {fix}")
    known = [time for time in times if time is not None]  # a file without a container has none
    if any(abs(time - known[0] - number / fps) > 1 / fps for number, time in enumerate(known)):
        raise ConfigError(f"{subject}: has a frame rate that varies, but a clip has a constant frame rate: {fix}")


def _rgb(frame: Any, subject: str) -> npt.NDArray[np.uint8]:
    """Returns the 8-bit RGB pixels [H, W, 3] of a frame, by the matrix that the file names. Raises ConfigError.

    Values are rounded to the nearest. PyAV's default cuts them off, and each generation would be darker by 1 of 255.
    """
    from av.video.reformatter import Colorspace, Interpolation

    is_709 = frame.colorspace == _UNNAMED and frame.height >= _HD_HEIGHT
    # FULL_CHR_H_INT selects the code that can round; ACCURATE_RND without it makes frames even darker.
    exact = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    with foreign(subject, _WHOLE):
        rgb = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709 if is_709 else None, interpolation=exact)
        pixels: npt.NDArray[np.uint8] = rgb.to_ndarray()
    return pixels
