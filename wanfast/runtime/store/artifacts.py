"""Stores each artifact in a folder that is named by the hash of all its inputs (a content-addressed store).

key = sha256 of the canonical JSON of ALL inputs. A writer takes a file lock, fills a temporary folder beside the
target, writes the manifest last, and renames the folder. A reader compares the manifest with its own inputs and with
the file sizes on disk. Nothing is ever overwritten. The store does not know what an artifact contains.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wanfast.runtime.errors import ConfigError, CorruptArtifactError

MANIFEST = "manifest.json"
# In a run folder: the first batch of jobs; the results, of all and of each; which rank group took which; how far each
# is; what ranks left; how ranks are set up; which batches are cancelled; that no batch will follow.
JOB, RESULT, RESULTS, CLAIMS, PROGRESS, RANKS = "job.json", "result.json", "results", "claims", "progress", "ranks"
SETUP, CANCEL, CLOSE = "setup.json", "cancel", "close"
LOADING = "loading the models"  # the stage of a rank group's progress before it can make a video


def batch_file(number: int) -> str:
    """The file of a run folder that holds a batch of jobs."""
    return JOB if number == 0 else f"job-{number:04d}.json"


def frames_file(run_folder: Path, index: int) -> Path:
    """Returns the file for the frames of a job that writes no video."""
    return run_folder / "frames" / f"{index}.npy"


@dataclass(frozen=True)
class ArtifactStore:
    root: Path

    def path(self, kind: str, inputs: dict[str, Any]) -> Path:
        return self.root / kind / key_of(inputs)[:12]

    def find(self, kind: str, inputs: dict[str, Any], *, verify: bool = False) -> Path | None:
        """Returns the artifact's folder, or None if the artifact is missing.

        Compares the inputs and the files' sizes with the manifest, and with `verify` also the files' hashes.
        Raises CorruptArtifactError if they differ, or if the manifest cannot be read.
        """
        folder = self.path(kind, inputs)
        if not (folder / MANIFEST).is_file():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            same = manifest["inputs"] == json.loads(_canonical(inputs)) and all(
                (folder / name).stat().st_size == facts["bytes"]
                and not (verify and _sha256(folder / name) != facts["sha256"])
                for name, facts in manifest["files"].items()
            )
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
            same = False
        if not same:
            raise CorruptArtifactError(f"{folder} was changed after it was made: remove it, and have it made again")
        return folder

    def publish(
        self,
        kind: str,
        inputs: dict[str, Any],
        write: Callable[[Path], None],
        versions: dict[str, str] | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Path:
        """Lets `write` fill a folder, publishes it completely, and returns it.

        If another writer was first, returns that writer's folder. Calls `waiting` if another writer holds the lock.
        Raises ConfigError if the store cannot be written.
        """
        folder = self.path(kind, inputs)
        with writing_to(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
            try:
                return self._publish(folder, kind, inputs, write, versions or {})
            finally:
                lock.release()

    def _publish(
        self, folder: Path, kind: str, inputs: dict[str, Any], write: Callable[[Path], None], versions: dict[str, str]
    ) -> Path:
        """Publishes the folder; the caller holds the lock."""
        if (found := self.find(kind, inputs)) is not None:
            return found
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a writer that died: nobody else holds the lock
        partial.mkdir()
        try:
            started = time.perf_counter()
            write(partial)
            files = {str(f.relative_to(partial)): _facts(f) for f in sorted(partial.rglob("*")) if f.is_file()}
            manifest = {
                "kind": kind,
                "key": key_of(inputs),
                "inputs": inputs,
                "files": files,
                "versions": versions,
                "seconds": round(time.perf_counter() - started, 3),
            }
            write_synced(partial / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def key_of(inputs: dict[str, Any]) -> str:
    """Returns the sha256 (hex) of the canonical JSON of `inputs`: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()


def new_run_folder(root: Path, inputs: dict[str, Any]) -> Path:
    """Makes a new folder runs/<utc>-<key8>, with a number appended if another run has that name.

    Raises ConfigError if the folder cannot be made.
    """
    stem = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{key_of(inputs)[:8]}"
    with writing_to(root):
        (root / "runs").mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            folder = root / "runs" / (f"{stem}-{attempt}" if attempt else stem)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise AssertionError("unreachable: itertools.count never ends")


@contextmanager
def writing_to(root: Path) -> Iterator[None]:
    """Turns an OSError, raised while the store is written, into a ConfigError that names --artifacts-dir."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--artifacts-dir {root}: cannot be written ({reason}); choose a folder that can be written"
        ) from error


def write_synced(path: Path, text: str) -> None:
    """Writes a small text file and syncs it, so that the text is on disk when this function returns."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a small text file in one step: another process sees the complete old text or the complete new text.

    The file is not synced, so that a crash of the machine may leave it incomplete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")  # threads may write at once
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_result(run_folder: Path, index: int, result: dict[str, Any]) -> None:
    """Writes the result of one job into its run folder."""
    replace_text(run_folder / RESULTS / f"{index}.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical(inputs: dict[str, Any]) -> str:
    return json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
