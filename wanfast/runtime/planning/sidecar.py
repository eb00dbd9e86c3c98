"""Writes, beside every video, a JSON file with the options, the plan, the versions and the seconds.

The run can be repeated from this file. The video, its JSON and its contact sheet are written together or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.runtime.config import OutputConfig, VideoConfig
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine.packages import versions
from wanfast.runtime.media import video_file
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.store.atomic import atomic_paths, not_written

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def planned(plan: Plan) -> dict[str, Any]:
    """Returns the JSON document of a plan; a dry run shows this document.

    A run adds seconds, memory, hardware and weights to the document.
    """
    return {
        "output": plan.config.output.output,
        "plan": plan_json(plan),
        "requested": dict(plan.requested),
        "effective": plan.config.to_json(),
        "seconds": {},
        "versions": versions(),
    }


def with_seconds(document: dict[str, Any], added: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Returns a copy of `document` with the entries `added` and the seconds of a run.

    `seconds`: the seconds of each stage; the copy also holds their sum, and rounds to 1 ms. `added`: further entries,
    such as memory and hardware.
    """
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return document | added | {"seconds": rounded | {"total": round(sum(seconds.values()), 3)}}


def moved(document: dict[str, Any], output: OutputConfig, video: VideoConfig | None = None) -> dict[str, Any]:
    """Returns a copy of a video's document with other paths.

    `output` names the written files, and `video` names the images. If `video` is None, the paths of the images stay.
    """
    effective = document["effective"] | {"output": dataclasses.asdict(output)}
    plan = document["plan"] | {"outputs": [str(path) for path in output.paths]}
    if video is not None:
        plan |= {"images": video.images}
        names = ("image", "continue_from", "last_image")
        effective |= {"video": effective["video"] | {name: getattr(video, name) for name in names}}
    return document | {"output": output.output, "effective": effective, "plan": plan}


def text(document: dict[str, Any]) -> str:
    """Returns a document as JSON text, as it is written to the file beside a video."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


class Recording:
    """Receives a video's frames while they are decoded, and writes `outputs`: mp4, JSON, perhaps a contact sheet.

    Each frame is freed after it is encoded. `finish` publishes all files together; if `finish` fails or is not called,
    no file appears. `add` and `finish` raise ConfigError for a file that cannot be written.
    """

    def __init__(self, outputs: tuple[Path, ...], fps: int, num_frames: int, *, overwrite: bool) -> None:
        """`outputs`: the paths of the files. `num_frames`: the number of frames of the whole video."""
        self._outputs, self._fps, self._overwrite = outputs, fps, overwrite
        self._shown = video_file.frames_of_sheet(num_frames) if len(outputs) == 3 else []
        self._passed = 0
        self._of_sheet: list[npt.NDArray[np.uint8]] = []
        self._files, self._encoder = ExitStack(), ExitStack()
        self._paths: list[Path] = []
        self._writer: video_file.Mp4Writer | None = None

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Removes what `finish` has not published."""
        kind = kind or InterruptedError
        try:
            self._encoder.__exit__(kind, error, trace)
        finally:
            with suppress(InterruptedError, ConfigError):
                self._files.__exit__(kind, error or InterruptedError(), trace)

    def add(self, frames: Iterable[npt.NDArray[np.uint8]]) -> None:
        """Queues the next frames [H, W, 3] for encoding, and returns at once.

        The frames must not change before `finish` returns. Raises ConfigError if the encoding of earlier frames failed.
        """
        if self._writer is None:
            self._paths = self._files.enter_context(atomic_paths(*self._outputs, overwrite=self._overwrite))
            self._writer = self._encoder.enter_context(video_file.Mp4Writer(self._paths[0], self._fps))
        try:
            self._writer.add(self._passing(frames))
        except OSError as error:
            raise not_written(self._outputs[0], error) from error

    def _passing(self, frames: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yields the frames to the encoder's thread, and copies those that the contact sheet shows."""
        for frame in frames:
            if self._passed in self._shown:
                self._of_sheet.append(frame.copy())
            self._passed += 1
            yield frame

    def finish(self, document: dict[str, Any]) -> dict[str, Any]:
        """Publishes the files of the video, and returns the document that the JSON file holds.

        `document`: the result of `with_seconds`. The returned copy also holds the seconds of writing and the sha256 of
        the mp4.
        """
        mp4, json_file, *sheet = self._paths
        with self._files:
            started = time.perf_counter()
            self._encoder.close()
            for path in sheet:
                video_file.write_contact_sheet(self._of_sheet, path)
            stages = {name: value for name, value in document["seconds"].items() if name != "total"}
            document = with_seconds(document, {}, stages | {"write": time.perf_counter() - started})
            document["output_sha256"] = hashlib.sha256(mp4.read_bytes()).hexdigest()
            json_file.write_text(text(document), encoding="utf-8")
        return document


def write_video(
    frames: npt.NDArray[np.uint8], document: dict[str, Any], outputs: tuple[Path, ...], *, overwrite: bool
) -> dict[str, Any]:
    """Writes frames [F, H, W, 3] to `outputs` = (mp4, JSON, perhaps a contact sheet) and returns the JSON document.

    `document`: the result of `with_seconds`. The returned document also holds the seconds of writing and the sha256 of
    the mp4. Raises ConfigError if a file cannot be written, or if it exists and `overwrite` is false.
    """
    with Recording(outputs, document["plan"]["fps"], len(frames), overwrite=overwrite) as recording:
        recording.add(frames)
        return recording.finish(document)


def write_made(document: dict[str, Any], files: Sequence[bytes], outputs: tuple[Path, ...], *, overwrite: bool) -> None:
    """Writes the files of a video that another machine made: mp4, JSON, perhaps a contact sheet.

    `files`: the bytes of the mp4, and of the contact sheet if there is one. Raises ConfigError if a file cannot be
    written, or if it exists and `overwrite` is false.
    """
    mp4, *sheet = files
    with atomic_paths(*outputs, overwrite=overwrite) as paths:
        for path, content in zip(paths, (mp4, text(document).encode(), *sheet), strict=True):
            path.write_bytes(content)
