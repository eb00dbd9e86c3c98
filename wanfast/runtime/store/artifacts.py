"""Stores each artifact in a folder that is named by the hash of all the artifact's inputs (a content-addressed store).

key = sha256 of the canonical JSON of ALL inputs. A writer takes a file lock, fills a temporary folder beside the
target, writes the manifest last, and renames the folder. A reader compares the manifest with its own inputs and with
all files in the folder. An artifact is damaged if its manifest is unreadable or has other inputs, if a file of the
manifest is missing or has another size, or if the folder has a file that the manifest does not list. An undamaged
artifact is never overwritten. The store does not know what an artifact contains.

Each caller chooses how a damaged artifact is handled. "refuse" raises an error, because the artifact took long to make
and the user must decide. "miss" treats the damaged artifact as a cache miss: the artifact is made again and replaces
the damaged one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.store.atomic import FULL, hindrance
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.sharing import locked, remove, share

Damaged = Literal["refuse", "miss"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """This class names an artifact's folder, and says whether `publish` made the artifact or found it in the store."""

    folder: Path
    made_here: bool


@dataclass(frozen=True)
class ArtifactStore:
    root: Path

    def path(self, kind: str, inputs: dict[str, Any]) -> Path:
        return self.root / kind / key_of(inputs)[:12]

    def find(
        self,
        kind: str,
        inputs: dict[str, Any],
        *,
        verify: bool = False,
        damaged: Damaged = "refuse",
        again: str = "run this command again",
    ) -> Path | None:
        """Returns the artifact's folder, or None if the artifact is missing.

        Compares the manifest with `inputs`, and with the names and sizes of the files in the folder. With `verify`,
        compares the hashes of the files too. If anything differs, raises CorruptArtifactError, whose message ends in
        "remove this folder, and {again}". With `damaged="miss"`, prints a note and returns None instead of raising.
        """
        folder = self.path(kind, inputs)
        if not os.path.lexists(folder):
            return None
        try:
            _check(folder, kind, inputs, _fix(damaged, again), verify=verify)
        except CorruptArtifactError as error:
            if damaged == "refuse":
                raise
            note(str(error))
            return None
        return folder

    def manifests(self, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields (folder, inputs) of each artifact whose manifest is readable.

        This method does not check the artifact's files; `find` checks them.
        """
        for manifest in sorted((self.root / kind).glob(f"*/{MANIFEST}")):
            with suppress(CorruptArtifactError):
                inputs = read_object(manifest, _fix("refuse")).get("inputs")
                if isinstance(inputs, dict) and not manifest.parent.suffix:  # else half written, or set aside
                    yield manifest.parent, inputs

    def publish(
        self,
        kind: str,
        inputs: dict[str, Any],
        write: Callable[[Path], None],
        versions: dict[str, str] | None = None,
        *,
        waiting: Callable[[], None] = lambda: None,
        damaged: Damaged = "refuse",
    ) -> Artifact:
        """Calls `write(folder)` to fill a new folder, and publishes the folder completely or not at all.

        If the artifact exists already, `write` is not called, and the result names the existing folder.
        `versions`: versions of packages, which the manifest records; they are no part of the key. `waiting`: a function
        that is called if another writer holds the lock. `damaged`: how an existing folder is checked, and what happens
        if it is damaged:

        * "refuse" checks the manifest, and the names and sizes of the files; it raises CorruptArtifactError.
        * "miss" also checks the hashes of the files; it replaces the damaged folder by a new one.

        All users who may read the store may read the folder. Raises ConfigError if the store cannot be written.
        """
        folder = self.path(kind, inputs)
        with writing_to(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock"), waiting):
                if os.path.lexists(folder):
                    try:
                        _check(folder, kind, inputs, _fix(damaged), verify=damaged == "miss")
                        return Artifact(folder, made_here=False)
                    except CorruptArtifactError:
                        if damaged == "refuse":
                            raise
                        remove(folder)
                _fill(folder, kind, inputs, write, versions or {})
        return Artifact(folder, made_here=True)

    def discard(self, kind: str, inputs: dict[str, Any]) -> None:
        """Removes the artifact of this kind and these inputs, which the caller cannot use.

        `publish` can then store another one in its place. Raises ConfigError if the store cannot be written.
        """
        folder = self.path(kind, inputs)
        with writing_to(self.root), locked(folder.with_suffix(".lock")):
            if os.path.lexists(folder):
                remove(folder)


def _fill(
    folder: Path, kind: str, inputs: dict[str, Any], write: Callable[[Path], None], versions: dict[str, str]
) -> None:
    """Makes the folder of an artifact; the caller holds the lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a writer that died: nobody else holds the lock
    partial.mkdir()
    try:
        started = time.perf_counter()
        write(partial)
        manifest = {
            "kind": kind,
            "key": key_of(inputs),
            "inputs": inputs,
            "files": _files_below(partial),
            "versions": versions,
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_synced(partial / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        share(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fix(damaged: Damaged, again: str = "run this command again") -> str:
    return "it is made again" if damaged == "miss" else f"remove this folder, and {again}"


def _check(folder: Path, kind: str, inputs: dict[str, Any], fix: str, *, verify: bool) -> None:
    """Raises CorruptArtifactError if a folder is not the artifact of `inputs`, completely and with nothing else."""
    manifest = read_object(folder / MANIFEST, fix)
    with foreign(str(folder / MANIFEST), fix, CorruptArtifactError):
        made = manifest["kind"], manifest["key"], manifest["inputs"]
        listed = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    with foreign(str(folder), fix, CorruptArtifactError):
        stats = {path: path.lstat() for path in folder.rglob("*")}
    sizes = _sizes(folder, stats)
    is_file = sizes.pop(MANIFEST, None) is not None
    # A name of the manifest is only compared, never opened: it cannot lead out of the folder.
    is_whole = is_file and bool(listed) and sizes == {name: size for name, (size, _) in listed.items()}
    is_ours = made == (kind, key_of(inputs), json.loads(_canonical(inputs)))
    if not (is_ours and _canonical(made[2]) == _canonical(inputs) and is_whole):  # true is equal to 1, but no 1
        raise CorruptArtifactError(f"{folder} was changed after it was made: {fix}")
    for name in sizes if verify else ():
        with foreign(str(folder), fix, CorruptArtifactError), (folder / name).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != listed[name][1]:
            raise CorruptArtifactError(f"{folder} was changed after it was made: {fix}")


def _sizes(folder: Path, stats: dict[Path, os.stat_result]) -> dict[str, int | None]:
    """Returns {name: bytes} of the files below a folder; None stands for a link or another thing."""
    return {
        path.relative_to(folder).as_posix(): found.st_size if stat.S_ISREG(found.st_mode) else None
        for path, found in stats.items()
        if not stat.S_ISDIR(found.st_mode)
    }


def key_of(inputs: dict[str, Any]) -> str:
    """Returns the sha256 (hex) of the canonical JSON of `inputs`: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()


def check_root(root: Path) -> None:
    """Raises ConfigError if the artifacts folder `root` cannot be accessed, for example without permission.

    A missing `root` is no error. After this check, calls such as `root.is_dir()` raise nothing.
    """
    with foreign(f"--artifacts-dir {str(root)!r:.60}", "give a folder that can be read"):
        root.exists()


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turns an OSError of the `with` block into a ConfigError that names --artifacts-dir and `place`.

    `place`: the file or folder of the store that the block writes.
    """
    try:
        yield
    except OSError as error:
        fix = "free some space, or choose another folder" if error.errno in FULL else "choose another folder"
        raise ConfigError(f"--artifacts-dir {place}: cannot be written ({hindrance(place, error)}); {fix}") from error


def note(line: str) -> None:
    """Prints a note for the user on stderr, if stderr can be written."""
    with suppress(OSError):  # a full disk, or a pipe that nobody reads, ends no video
        print(f"note: {line}", file=sys.stderr)


@contextmanager
def noting(consequence: str = "") -> Iterator[None]:
    """Prints a ConfigError of the `with` block as a note, so that the command goes on.

    `consequence`: what the error means for the user; the note ends with this text. Use this function only around the
    writing of files that no video needs, such as records and caches.
    """
    try:
        yield
    except ConfigError as error:
        note(f"{error}: {consequence}" if consequence else str(error))


def write_synced(path: Path, text: str) -> None:
    """Writes a small text file and syncs it, so that the text is on disk when this function returns.

    Raises ConfigError.
    """
    with writing_to(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a small text file in one step: another process sees the complete old text or the complete new text.

    The file is not synced: a crash of the machine may leave it incomplete. Raises ConfigError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")  # threads may write at once
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _files_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Syncs each file below a folder, and returns its bytes and sha256; raises ValueError for a link or other thing."""
    files = {}
    for name, size in sorted(_sizes(folder, {path: path.lstat() for path in folder.rglob("*")}).items()):
        if size is None:
            raise ValueError(f"{name} is neither a file nor a folder")
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
            files[name] = {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    return files


def _canonical(inputs: dict[str, Any]) -> str:
    return json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
