"""Writes frames as an mp4 and as a contact sheet, and checks beforehand that both files can be written.

Nothing here imports torch. The caller publishes files completely or not at all (`store.atomic`).
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.store.atomic import hindrance, partial_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def check_outputs(path: str, *beside: Path, overwrite: bool, needed_bytes: int, option: str = "--output") -> None:
    """Checks, before any work, that an mp4 of `needed_bytes` can be written to `path`.

    Further files, at the paths `beside`, must be writable too. An existing file is an error if `overwrite` is False.
    Raises ConfigError: one line with the option, the path and the fix. `option` is the name of the option that gave
    `path`.
    """
    target, subject = Path(path), f"{option} {path}"
    folder = target.parent
    try:
        if target.suffix.lower() != ".mp4" and target.is_dir():
            raise ConfigError(f"{subject}: is a folder; give an .mp4 file in it")
        if target.suffix.lower() != ".mp4":
            raise ConfigError(f"{subject}: the name must end in .mp4")
        if not folder.exists():
            raise ConfigError(f"{subject}: its folder does not exist; run `mkdir -p {shlex.quote(str(folder))}`")
        _check_file(target, f"{subject}:", overwrite=overwrite)
        for other in beside:
            _check_file(other, f"{subject}: {other.name}, written beside the video,", overwrite=overwrite)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(
            f"{subject}: cannot be written ({hindrance(target, error)}); choose another folder or name"
        ) from error
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{subject}: needs {gb(needed_bytes)} and {folder} has {gb(free_bytes)} free; "
            "free some space or choose another folder"
        )


def _check_file(target: Path, subject: str, *, overwrite: bool) -> None:
    """Raises ConfigError if `target` cannot be replaced, and OSError if no file can be written beside it."""
    probe = partial_path(target)
    probe.touch()  # os.access does not help: it says yes to root, and on a read-only mount
    probe.unlink()
    if target.is_dir():
        raise ConfigError(f"{subject} is a folder; remove it or choose another name")
    if os.path.lexists(target) and not overwrite:  # a link that leads nowhere exists too
        raise ConfigError(f"{subject} already exists; choose another name or add --overwrite")


class Mp4Writer:
    """Encodes frames as an mp4 in a separate thread, while the next frames are made.

    Use this class in a `with` block, and give `add` the frames [H, W, 3], with even H and W. Do not change the frames
    before the block ends. The file is complete after the block. If the encoding fails, `add` or the end of the block
    raises OSError, and the caller must remove the file.

    The video is H.264: yuv420p, BT.709 in limited range, with the constant rate factor (CRF) `crf`. Players can start
    before they have the whole file. The same frames give the same bytes, whether they are added at once or a few at a
    time.
    """

    def __init__(self, path: Path, fps: int, crf: int = 10) -> None:
        self._path, self._fps, self._crf = path, fps, crf
        self._thread = ThreadPoolExecutor(1)
        self._encoding: list[Future[None]] = []
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import av

        try:
            if kind is None:
                self._encoding.append(self._thread.submit(self._end))
                self._raise_failures(self._encoding)
        finally:
            self._thread.shutdown(cancel_futures=True)
            if self._container is not None:
                with suppress(OSError, ValueError, av.FFmpegError):  # the block failed, and its caller removes the file
                    self._container.close()

    def add(self, frames: Iterable[npt.NDArray[np.uint8]]) -> None:
        """Queues the next frames for encoding and returns at once.

        If `frames` is an iterator, the encoder's thread runs it. An error in this thread is raised by this or a later
        call of `add`, or at the end of the `with` block: OSError if the encoding failed, or the iterator's exception.
        """
        self._encoding.append(self._thread.submit(self._encode, frames))
        self._raise_failures(future for future in self._encoding if future.done())

    def _raise_failures(self, encoding: Iterable[Future[None]]) -> None:
        import av

        try:
            for future in encoding:
                future.result()
        except av.FFmpegError as error:  # not each is an OSError: too little memory, and what x264 reports
            raise OSError(error.errno, error.strerror) from error

    def _open(self, height: int, width: int) -> None:
        import av

        # PyAV is called directly: imageio's plugin drops encoder options (CRF 10 was requested, the stream said 23).
        # The stream depends on the number of threads. `cpu-independent` turns off x264's assembly for macroblock-tree,
        # which reads uninitialized memory. (AVX-512 machine, PyAV 18.1: without this setting the bytes differed for
        # every MALLOC_PERTURB_, and from run to run in one process.)
        same_bytes = {"threads": "8", "thread_type": "frame", "x264-params": "cpu-independent=1"}
        # Both stream and container name the colours, because players would otherwise guess others for small videos.
        colours = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
        # With `faststart`, the file's index comes first.
        self._container = av.open(str(self._path), "w", format="mp4", options={"movflags": "faststart"})
        options = {"crf": str(self._crf), **same_bytes, **colours}
        self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"

    def _encode(self, frames: Iterable[npt.NDArray[np.uint8]]) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

        reformatter, full, limited = VideoReformatter(), ColorRange.JPEG, ColorRange.MPEG
        for frame in frames:
            if self._container is None:
                self._open(*frame.shape[:2])
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = reformatter.reformat(
                rgb, format="yuv420p", src_color_range=full, dst_colorspace=Colorspace.ITU709, dst_color_range=limited
            )
            self._container.mux(self._stream.encode(yuv))

    def _end(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


def frames_of_sheet(num_frames: int, count: int = 8) -> list[int]:
    """Returns the numbers, counted from 0, of the frames that a contact sheet of a video shows.

    The frames are evenly spaced, from the first to the last frame of the video. If the video has fewer than `count`
    frames, all are shown.
    """
    count = min(count, num_frames)
    return [cell * (num_frames - 1) // max(count - 1, 1) for cell in range(count)]


def write_contact_sheet(frames: Sequence[npt.NDArray[np.uint8]], path: Path, columns: int = 4) -> None:
    """Writes a PNG that shows the frames [H, W, 3] row by row, with `columns` frames in a row.

    Raises OSError if the file cannot be written.
    """
    import numpy as np
    from PIL import Image

    height, width, _ = frames[0].shape
    columns = min(columns, len(frames))
    sheet = np.zeros((-(-len(frames) // columns) * height, columns * width, 3), dtype=np.uint8)
    for cell, frame in enumerate(frames):
        top, left = cell // columns * height, cell % columns * width
        sheet[top : top + height, left : left + width] = frame
    Image.fromarray(sheet).save(path, format="PNG")
