"""Runs one rank group on a machine of a Ray cluster; the user's command runs on another machine.

The ranks keep running from one line of a list to the next, so that models are loaded once. An image arrives as bytes
and a video leaves as bytes, because the machines need not share a disk. Weights, LoRAs and artifacts are not sent: each
machine must have them under the same paths.
This module imports neither Ray nor torch; the command starts `RemoteGroup` as a Ray actor.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, failure
from wanfast.runtime.machine.host import THREADS
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.progress import LOADING, Progress
from wanfast.runtime.processes.launch import RankGroups
from wanfast.runtime.processes.run_folder import new_run_folder
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import writing_to

_WORKER = "wanfast.runtime.jobs.generate"


@dataclass(frozen=True)
class Delivered:
    """Holds the result of a list's line: the document of a video and the bytes of the video's files, or an error."""

    result: dict[str, Any]
    files: tuple[bytes, ...] = ()  # the mp4, then perhaps the contact sheet
    is_lost: bool = False  # by this machine's ranks or their models, so that another machine may succeed


class RemoteGroup:
    """This class owns a rank group. One thread calls `make`; other threads may call `state` and `stop` meanwhile."""

    def __init__(self, threads: str | None) -> None:
        """`threads`: OMP_NUM_THREADS of the command. Ray sets its own, with which a CPU rounds differently."""
        os.environ.pop(THREADS, None)
        if threads is not None:
            os.environ[THREADS] = threads
        self._folder: Path | None = None
        self._ranks: RankGroups | None = None
        self._state: Progress = ("", 0, 0)
        self._lock = threading.Lock()  # of the start of the ranks
        self._is_stopped = False

    def check(self, jobs: list[tuple[dict[str, Any], Mapping[str, str]]]) -> dict[str, Any] | None:
        """Compares this machine's weights with those on the machine where the user runs the command.

        Returns None if the weights are equal, else the error as a JSON document.
        `jobs`: one pair for each model. The first item is a job that uses the model, as JSON. The second item is
        {component of the model: fingerprint of its weights on the user's machine}.
        """
        try:
            for document, fingerprints in jobs:
                models = Job.from_json(document).config.models
                files = model_files.locate_for(models)
                files.require()
                files.identify()
                if files.fingerprints != fingerprints:
                    raise ConfigError(
                        f"--model {models.model}: the weights on a machine of the cluster differ from those on the "
                        "machine where you run wanfast: copy your weights to that machine of the cluster, or leave "
                        "that machine out of the cluster"
                    )
        except WanFastError as error:
            return failure(error)
        return None

    def make(self, document: dict[str, Any], images: Mapping[str, bytes]) -> Delivered:
        """Makes the video of a job, and returns the video's document and files, or an error.

        `document`: the job as JSON; it must name an output file. `images`: one item for each option of the job
        that names an image file, such as {"--image": content of the file}.
        """
        self._state = ("", 0, 0)
        try:
            job = Job.from_json(document)
            ranks, folder = self._started(job.config)
            with self._files(job, folder, images) as moved:
                return self._made(ranks, moved)
        except WanFastError as error:  # this machine's disk is full, or its processes are too many
            return Delivered(failure(error), is_lost=True)

    def state(self) -> Progress:
        """Returns the progress of the current video: (stage, steps done, number of all steps)."""
        return self._state

    def close(self) -> None:
        """Ends the ranks after the current video."""
        if self._ranks is not None:
            self._ranks.close()
        self._remove_files()

    def stop(self) -> None:
        """Ends the ranks immediately."""
        with self._lock:
            self._is_stopped = True
            if self._ranks is not None:
                self._ranks.stop()
        self._remove_files()

    def _started(self, config: EffectiveConfig) -> tuple[RankGroups, Path]:
        """Returns the rank group and the folder of its files; starts it before the first video. Raises WanFastError."""
        with self._lock:
            if self._is_stopped:
                raise RankFailedError("the command has stopped this rank group: run the command again")
            if self._ranks is None or self._folder is None:
                run_folder = new_run_folder(Path(config.models.artifacts_dir), {"verb": "ray", "pid": os.getpid()})
                self._ranks = RankGroups(run_folder, config.ranks, groups=1)
                self._folder = run_folder / "files"
            return self._ranks, self._folder

    @contextmanager
    def _files(self, job: Job, folder: Path, images: Mapping[str, bytes]) -> Iterator[Job]:
        """Yields the same job with images and output files of this machine, which are removed at the end."""
        config, output = job.config, folder / "video.mp4"
        here = {
            flag: folder / f"{flag.removeprefix('--')}{Path(path).suffix}" for flag, path in config.video.images.items()
        }
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
            for flag, file in here.items():
                file.write_bytes(images[flag])
        video = config.video.with_images({flag: str(file) for flag, file in here.items()})
        files = dataclasses.replace(config.output, output=str(output), overwrite=True, skip_existing=False)
        try:
            yield dataclasses.replace(job, config=dataclasses.replace(config, video=video, output=files))
        finally:
            for file in (*here.values(), *files.paths):
                file.unlink(missing_ok=True)

    def _made(self, ranks: RankGroups, job: Job) -> Delivered:
        outputs = list(job.config.output.paths)
        (result,) = ranks.run(
            _WORKER, [job.to_json()], outputs,
            on_result=lambda index, result: None, on_progress=self._on_progress,
        )  # fmt: skip
        if "error" in result:
            return Delivered(result, is_lost=ranks.has_dead or self._state[0] == LOADING)
        mp4, _, *sheet = outputs
        return Delivered(result, tuple(file.read_bytes() for file in (mp4, *sheet)))

    def _on_progress(self, index: int, stage: str, done: int, total: int) -> None:
        self._state = (stage, done, total)

    def _remove_files(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
