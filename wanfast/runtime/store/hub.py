"""The published weights from the Hugging Face Hub into <artifacts>/checkpoints/<repo name>.

The hub is asked once what the revision is and holds; what follows is pinned to that commit, and what lies on disk in
the end is compared with that answer. For huggingface_hub's own word is not enough: it can return without an error and
without files, and its dry run gives a damaged file's own size as the right one. A manifest, written last, records the
commit, so that two of them never mix in one folder.

Cost: one request when all is there; of what came, each large file is read once more for its sha256. Limits: what was
there before is verified by size alone (126 GB would have to be read again); a file of which a part had come when the
process was killed starts from 0, as huggingface_hub names its parts at random.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._xet import abort_xet_session
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars, tqdm

from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError, WanFastError
from wanfast.runtime.store.artifacts import write_synced

MANIFEST = "wanfast-download.json"

_Layout = Literal["original", "diffusers"]
_REPOS: dict[_Layout, str] = {
    "original": "Wan-AI/Wan2.2-I2V-A14B",
    "diffusers": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
}
# The published state that this program is made for; another is a choice.
PINNED = {
    "Wan-AI/Wan2.2-I2V-A14B": "206a9ee1b7bfaaf8f7e4d81335650533490646a3",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "596658fd9ca6b7b71d5057529bbf319ecbc61d74",
}
_NEEDED: dict[_Layout, tuple[str, ...]] = {  # at least one file of each
    "original": (
        "high_noise_model/config.json",
        "high_noise_model/*.safetensors",
        "low_noise_model/config.json",
        "low_noise_model/*.safetensors",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
    ),
    "diffusers": (
        "model_index.json",
        *(f"{part}/config.json" for part in ("transformer", "transformer_2", "vae", "text_encoder")),
        *(f"{part}/*.safetensors" for part in ("transformer", "transformer_2", "vae", "text_encoder")),
        "tokenizer/tokenizer.json",
    ),
}
_INDEX = "*.safetensors.index.json"  # where there is more than one shard


@dataclass(frozen=True)
class Request:
    """What to fetch, and where it goes."""

    repo: str
    revision: str
    layout: _Layout
    folder: Path

    @classmethod
    def of(cls, repo: str | None, revision: str | None, layout: _Layout, artifacts_dir: str) -> Request:
        """Raises ConfigError for an empty value."""
        repo = _REPOS[layout] if repo is None else repo
        revision = PINNED.get(repo, "main") if revision is None else revision
        for option, value in (("--repo", repo), ("--revision", revision), ("--artifacts-dir", artifacts_dir)):
            if not value.strip() or "\0" in value:
                raise ConfigError(f"{option} {value!r}: give a value, or leave it out")
        folder = Path(artifacts_dir).expanduser().absolute() / "checkpoints" / repo.rpartition("/")[2]
        return cls(repo, revision, layout, folder)


@dataclass(frozen=True)
class _Listing:
    """What the hub says that a commit holds of the needed files: name -> bytes, and name -> hash."""

    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    sha256: dict[str, str]  # of large files; the hash of another is git's

    def missing(self, folder: Path) -> list[str]:
        """The files that are not in `folder` at their size."""
        return [name for name, size in self.sizes.items() if _size(folder / name) != size]


def plan(request: Request) -> dict[str, Any]:
    """What `download` would fetch, with nothing written. Raises as `download` does."""
    listing = _list(request)
    _refuse_to_mix(request, listing)
    missing_bytes = _require_space(request, listing)
    return _result(request, listing) | {"missing_bytes": missing_bytes}


def download(request: Request, *, progress: bool) -> dict[str, Any]:
    """Fetch what is missing and verify it; returns what is there now.

    Raises ConfigError (a wrong option, no access, no space, another commit there), MissingArtifactError (the hub cannot
    be reached) and CorruptArtifactError (the repository, or what came of it, is not whole).
    """
    started = time.perf_counter()
    listing = _list(request)
    with _only_writer(request.folder):
        _refuse_to_mix(request, listing)
        _remove_orphans(request.folder)
        _require_space(request, listing)
        missing = listing.missing(request.folder)
        _fetch(request, listing, progress=progress)
        _verify(request, listing)
        _verify_hashes(request, listing, missing)
        _write_manifest(request, listing)
    return _result(request, listing) | {"seconds": round(time.perf_counter() - started, 3)}


def _list(request: Request) -> _Listing:
    with _hub_errors(request):
        info = HfApi(endpoint=_endpoint()).model_info(
            request.repo, revision=request.revision, files_metadata=True, timeout=30
        )
    files = {file.rfilename: file for file in info.siblings or [] if _is_needed(file.rfilename, request.layout)}
    for pattern in _NEEDED[request.layout]:
        if not any(fnmatchcase(name, pattern) for name in files):
            raise CorruptArtifactError(
                f"--repo {request.repo}: no {pattern} in it at {info.sha}: it has not --layout {request.layout}, "
                "or is not whole; take another --repo or --revision"
            )
    sizes = {name: file.size for name, file in sorted(files.items())}
    if info.sha is None or None in sizes.values():
        raise CorruptArtifactError(
            f"{_endpoint()} does not tell the commit and sizes of {request.repo}: see HF_ENDPOINT"
        )
    hashes = {name: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for name, file in sorted(files.items())}
    sha256 = {name: file.lfs.sha256 for name, file in files.items() if file.lfs}
    return _Listing(info.sha, {name: int(size or 0) for name, size in sizes.items()}, hashes, sha256)


def _is_needed(name: str, layout: _Layout) -> bool:
    shards = [pattern for pattern in _NEEDED[layout] if pattern.endswith("/*.safetensors")]
    indices = [pattern.replace("*.safetensors", _INDEX) for pattern in shards]
    return any(fnmatchcase(name, pattern) for pattern in (*_NEEDED[layout], *indices))


def _fetch(request: Request, listing: _Listing, *, progress: bool) -> None:
    (enable_progress_bars if progress else disable_progress_bars)()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings are our errors
    with _hub_errors(request), warnings.catch_warnings(), _prompt_to_stop() as bar:
        warnings.simplefilter("ignore")
        for name in listing.missing(request.folder):
            (request.folder / name).unlink(missing_ok=True)  # of a wrong size: the library may take it for whole
        try:
            snapshot_download(
                request.repo,
                revision=listing.commit,
                local_dir=request.folder,
                allow_patterns=list(listing.sizes),
                endpoint=_endpoint(),
                tqdm_class=bar,
            )
        except RuntimeError as error:  # what hf_xet raises for a network that fails
            raise ConnectionError(_first_line(error)) from error


@contextmanager
def _prompt_to_stop() -> Iterator[type[tqdm]]:
    """A class of progress bars through which Ctrl-C and SIGTERM end the files in flight, not after 10 GB of each."""
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return bool(super().update(n))

    def stop(number: int, frame: FrameType | None) -> Any:
        stopped.set()  # plain HTTP
        abort_xet_session()  # type: ignore[no-untyped-call]
        return handlers[number](number, frame)

    current = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {int(number): handler for number, handler in current.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield Bar
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _endpoint() -> str:
    """Passed to every call: huggingface_hub reads the variable once, at import."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _verify(request: Request, listing: _Listing) -> None:
    """All is there at its size, and so is every shard that an index names."""
    for name in listing.missing(request.folder):
        size, wanted = _size(request.folder / name), listing.sizes[name]
        found = "is missing" if size is None else f"has {size} bytes, not {wanted}"
        raise CorruptArtifactError(
            f"{request.folder / name} {found} after the download: remove what is there of it and run it again"
        )
    for index in (name for name in listing.sizes if fnmatchcase(name, _INDEX)):
        folder = index.rpartition("/")[0]
        try:
            shards = set(json.loads((request.folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptArtifactError(
                f"{request.folder / index}: not an index of shards; take another --revision"
            ) from None
        for shard in sorted(shards):
            if f"{folder}/{shard}" not in listing.sizes:
                raise CorruptArtifactError(
                    f"--repo {request.repo}: no {folder}/{shard} in it at {listing.commit}, which its index names; "
                    "take another --revision"
                )


def _verify_hashes(request: Request, listing: _Listing, names: list[str]) -> None:
    """Those of `names` whose sha256 the hub tells; a wrong one is removed: next time its size would do."""
    wrong = []
    for name in (name for name in names if name in listing.sha256):
        path = request.folder / name
        with _hub_errors(request), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != listing.sha256[name]:
            path.unlink()
            wrong.append(str(path))
    if wrong:
        raise CorruptArtifactError(
            f"{', '.join(wrong)}: not the sha256 that the hub tells after the download: removed; run it again"
        )


def _refuse_to_mix(request: Request, listing: _Listing) -> None:
    """Another commit may follow only if its files are the same."""
    path = request.folder / MANIFEST
    if not path.is_file():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        same, what = there["files"] == _manifest_files(listing), f"{there['repo']} at {there['commit']}"
    except (ValueError, KeyError, TypeError):
        raise CorruptArtifactError(f"{path} is not the record of a download: remove it and run it again") from None
    if not same:
        raise ConfigError(
            f"--revision {request.revision}: {request.folder} holds {what}, and {request.repo} at {listing.commit} has "
            "other files: remove that folder, or take another --artifacts-dir"
        )


def _write_manifest(request: Request, listing: _Listing) -> None:
    manifest = {
        "repo": request.repo,
        "commit": listing.commit,
        "layout": request.layout,
        "files": _manifest_files(listing),
    }
    with _hub_errors(request):
        partial = request.folder / f".{MANIFEST}.part"
        write_synced(partial, json.dumps(manifest, indent=2) + "\n")
        partial.replace(request.folder / MANIFEST)


def _manifest_files(listing: _Listing) -> dict[str, Any]:
    return {name: {"bytes": size, "hash": listing.hashes[name]} for name, size in listing.sizes.items()}


def _require_space(request: Request, listing: _Listing) -> int:
    """The bytes that are missing, for which there is room. Raises ConfigError."""
    needed = sum(listing.sizes[name] for name in listing.missing(request.folder))
    there = next(path for path in (request.folder, *request.folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"--artifacts-dir: the download needs {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free: "
            "free some space or choose another folder"
        )
    return needed


def _remove_orphans(folder: Path) -> None:
    """What a killed download left: its name is random, so that no later one goes on with it."""
    for orphan in (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        orphan.unlink(missing_ok=True)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--artifacts-dir: another download writes to {folder}; wait for it, or stop it") from None
    except OSError as error:
        raise ConfigError(f"--artifacts-dir: {folder} cannot be written ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        lock.release()


def _result(request: Request, listing: _Listing) -> dict[str, Any]:
    return {
        "repo": request.repo,
        "commit": listing.commit,
        "layout": request.layout,
        "folder": str(request.folder),
        "files": listing.sizes,
        "bytes": sum(listing.sizes.values()),
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextmanager
def _hub_errors(request: Request) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise ConfigError(f"--repo {request.repo!r} is no OWNER/NAME of the Hugging Face Hub") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        wraps = isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, (httpx2.HTTPError, OSError))
        raise _in_one_line(error.__cause__ if wraps and error.__cause__ else error, request) from error


def _in_one_line(error: BaseException, request: Request) -> WanFastError:
    """The library's error as ours. The order matters: a gated repository is a kind of missing one to the library."""
    repo, page = request.repo, f"{_endpoint()}/{request.repo}"
    again = "run it again: files that are whole are kept"
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"--repo {repo} is gated: accept its terms at {page}, and set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(
            f"--revision {request.revision}: no such commit, branch or tag in {repo}: see {page}/commits"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            return ConfigError(
                f"--repo {repo}: {_endpoint()} answers {status}: no such repository, or it is private: "
                "fix the name, or set HF_TOKEN to a valid token"
            )
        return MissingArtifactError(f"{_endpoint()} answers {status} for {repo}: wait a little and {again}")
    if isinstance(error, OfflineModeIsEnabled):
        return MissingArtifactError(f"the download of {repo} needs the network: unset HF_HUB_OFFLINE and {again}")
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
        reason = _first_line(error)
        return MissingArtifactError(
            f"{_endpoint()} cannot be reached ({reason}): fix the network, proxy or HF_ENDPOINT and {again}"
        )
    if isinstance(error, (httpx2.HTTPError, ConnectionError, TimeoutError)):
        return MissingArtifactError(f"the connection to {_endpoint()} broke ({_first_line(error)}): {again}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ConfigError(f"--artifacts-dir: the disk of {request.folder} is full: free some space and {again}")
    if isinstance(error, OSError) and error.errno is not None:
        return ConfigError(f"--artifacts-dir: {request.folder} cannot be written ({error.strerror}): choose another")
    return CorruptArtifactError(f"the download of {repo} failed ({_first_line(error)}): {again}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
