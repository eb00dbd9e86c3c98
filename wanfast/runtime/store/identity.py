"""Computes the identity of weights from the sha256 of every file; each sha256 is computed once and remembered.

The sha256 covers all bytes of the file. A record `hashes/<key>.json` in the artifacts folder remembers the sha256 of
one large file, together with the file's path, size, inode, mtime and ctime. If any of these values has changed, the
file is hashed again. Many processes may need the sha256 at once: one process hashes the file under a lock, and the
others wait for the record.

The Hugging Face cache names a file by the file's sha256. When such a file is first seen, its name is taken as the
sha256 without hashing. A later change of such a file is noticed in the same way as a change of any other file.
This module does not import torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.store.artifacts import note, replace_text
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.sharing import locked

KIND = "hashes"
_SMALL_BYTES = 64 << 20  # hashed in a tenth of a second, so that a record is not worth it
_THREADS = 4  # hashlib lets other threads run
_TRIES = 3  # if only the time of change changes
_BLOB = re.compile(r"[0-9a-f]{64}")

State = dict[str, Any]  # what changes if a file's content changes
Items = tuple[tuple[str, Any], ...]  # of a State


def identity(files: list[Path], artifacts: Path) -> str:
    """Returns one hash of the names and contents of `files`; the folder of the files does not matter.

    `artifacts`: the folder in which the sha256 of large files is remembered. Raises ConfigError if a file cannot be
    read.
    """
    digest = hashlib.sha256()
    for file, sha256 in sha256_of(files, artifacts).items():
        digest.update(f"{file.name} {sha256}\n".encode())
    return digest.hexdigest()


def digest_of(files: Iterable[Path], artifacts: Path, option: str) -> str:
    """Returns one hash of the contents of `files`; for one file, the hash is the file's sha256.

    The order of the files matters. Their names do not matter, because users choose them. `artifacts`: the folder in
    which the sha256 of large files is remembered. `option`: the option that gave the files. Raises ConfigError if a
    file cannot be read; the error names `option`.
    """
    hashes = list(sha256_of(files, artifacts, option).values())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def is_old(identity: object) -> bool:
    """Returns whether an identity has the form that earlier versions of wanfast used.

    Those versions hashed only samples of a large file, not the whole file.
    """
    return isinstance(identity, str) and re.fullmatch(r"[0-9a-f]{16}", identity) is not None


def sha256_of(files: Iterable[Path], artifacts: Path, option: str = "--model") -> dict[Path, str]:
    """Returns the sha256 of each file, in order; prints a note before it hashes large files.

    `artifacts` is the folder in which the hashes of large files are remembered. If this folder cannot be written, the
    next process hashes the files again. Raises ConfigError if a file cannot be read; the error names `option`, the
    option that gave the files.
    """
    states = {file: _state(file, option) for file in files}
    known = {file: _known(file, state, artifacts, option) for file, state in states.items()}
    unknown = [file for file in states if known[file] is None]
    if unknown:
        size = sum(states[file]["bytes"] for file in unknown) / 1e9
        note(
            f"hashing {size:.1f} GB of weights in {unknown[0].parent}: this is done only once, "
            f"and takes at most about {size + 1:.0f} s"
        )
    with ThreadPoolExecutor(_THREADS) as threads:
        hashed = threads.map(lambda file: _hashed(file, states[file], artifacts, option), unknown)
        known |= dict(zip(unknown, hashed, strict=True))
    return {file: known[file] or "" for file in states}


def _state(file: Path, option: str = "--model") -> State:
    """Returns what changes if a file's content changes; the time of change is one that no program can set."""
    with foreign(f"{option}: {file}", "make this file readable, or copy it again"):
        real = file.resolve(strict=True)
        found = real.stat()
    return {
        "path": str(real),
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _record(state: State, artifacts: Path) -> Path:
    return artifacts / KIND / f"{hashlib.sha256(state['path'].encode(errors='surrogateescape')).hexdigest()[:12]}.json"


def _known(file: Path, state: State, artifacts: Path, option: str) -> str | None:
    """Returns the sha256 of a file if a record, or the file's name in the Hugging Face cache, tells it."""
    if state["bytes"] < _SMALL_BYTES:
        return _hash(file, tuple(state.items()), option)[0]
    record = _record(state, artifacts)
    with suppress(CorruptArtifactError):
        document = read_object(record, "it is made again")
        if _BLOB.fullmatch(str(sha256 := document.pop("sha256", None))):
            return sha256 if document == state else None
    real = Path(state["path"])
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) and not record.exists():
        _remember(state, real.name, artifacts)
        return real.name
    return None


def _hashed(file: Path, state: State, artifacts: Path, option: str) -> str:
    """Hashes a file and remembers the result, or waits for another process that does."""
    record = _record(state, artifacts)
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written: every process hashes for itself
            record.parent.mkdir(parents=True, exist_ok=True)
            wait = functools.partial(note, f"another process hashes {file}: waiting for it")
            stack.enter_context(locked(record.with_suffix(".lock"), wait))
        if (known := _known(file, state, artifacts, option)) is not None:
            return known
        sha256, hashed = _hash(file, tuple(state.items()), option)
        _remember(dict(hashed), sha256, artifacts)
    return sha256


def _remember(state: State, sha256: str, artifacts: Path) -> None:
    with suppress(ConfigError):
        replace_text(_record(state, artifacts), json.dumps({**state, "sha256": sha256}) + "\n")


@functools.lru_cache(maxsize=256)
def _hash(file: Path, state: Items, option: str) -> tuple[str, Items]:
    """Returns the sha256 of a file, and the state that was hashed: `state`, unless only its ctime changes meanwhile.

    A new hard link, for example, changes the ctime but not the content. Raises ConfigError, also if the file itself
    changes while it is read.
    """
    for _ in range(_TRIES):
        with foreign(f"{option}: {file}", "make this file readable, or copy it again"), file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        now = tuple(_state(file, option).items())
        if now == state:
            return found, state
        if dict(now) | {"ctime_ns": 0} != dict(state) | {"ctime_ns": 0}:
            break
        state = now
    raise ConfigError(f"{option}: {file} changes while it is read: wait until the file is complete")
