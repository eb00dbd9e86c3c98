"""Downloads published weights from the Hugging Face Hub: a model, or a pair of distilled LoRAs, one for each expert.

A model is stored in <artifacts>/checkpoints/<repo name>, and a pair in <artifacts>/loras/<name of the pair>.

A download first asks the hub for the commit and the files of a revision. Then it fetches the files of this commit that
are missing. At the end, it compares the sizes of all files, and the sha256 of the large files, with the hub's answer.
The manifest is written last and records the commit. If another commit has other files, its download into the same
folder is refused.

If the Hugging Face cache holds the whole commit, nothing is downloaded: `--model` reads the weights in the cache.
If the process is killed, the next download fetches an incomplete file again from its first byte.
"""

from __future__ import annotations

import dataclasses
import errno
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
from typing import Any

import httpx2
from filelock import Timeout
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

from wanfast.runtime.config.option import absolute, did_you_mean
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError, WanFastError
from wanfast.runtime.facts.choices import Layout
from wanfast.runtime.store.artifacts import check_root, write_synced
from wanfast.runtime.store.atomic import hindrance
from wanfast.runtime.store.hub_cache import PINNED, REPOS, PublishedModel, snapshots
from wanfast.runtime.store.identity import sha256_of
from wanfast.runtime.store.json_files import read_object
from wanfast.runtime.store.lora_pairs import PAIRS, folder_of, words_of
from wanfast.runtime.store.sharing import lock_of, share

MANIFEST = "wanfast-download.json"

_NEEDED: dict[Layout, tuple[str, ...]] = {  # each pattern must match a file
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
_AGAIN = "run the download again"
_INDEX = "*.safetensors.index.json"  # present if there is more than one shard


@dataclass(frozen=True)
class DownloadRequest:
    """This class says what to download, and into which folder."""

    repo: str
    revision: str
    layout: Layout
    folder: Path
    artifacts: Path
    model: PublishedModel
    lora: str | None = None  # the name of a pair

    @classmethod
    def of(
        cls,
        repo: str | None,
        revision: str | None,
        layout: Layout | None,
        artifacts_dir: str,
        lora: str | None = None,
        model: PublishedModel | None = None,
    ) -> DownloadRequest:
        """Makes a request; a value that is None gets its default. Raises ConfigError for a wrong or an empty value."""
        if lora is not None:
            if lora not in PAIRS:
                fix = did_you_mean(lora, PAIRS, f"use {' or '.join(PAIRS)}")
                raise ConfigError(f"--lora {lora!r:.40} is not the name of a published pair of LoRAs: {fix}")
            for option, value in (("--repo", repo), ("--layout", layout), ("--model", model)):
                if value is not None:
                    raise ConfigError(f"{option} and --lora exclude each other: drop one of the two")
            repo = PAIRS[lora].repo
        elif model is not None and repo is not None:
            raise ConfigError("--model and --repo exclude each other: drop one of the two")
        layout, model = layout or "original", model or "a14b"
        repo = REPOS[model][layout] if repo is None else repo
        revision = PINNED.get(repo, "main") if revision is None else revision
        for option, value in (("--repo", repo), ("--revision", revision), ("--artifacts-dir", artifacts_dir)):
            if not value.strip() or "\0" in value:
                raise ConfigError(f"{option} {value!r}: give a value, or leave out the option")
        artifacts = Path(absolute(artifacts_dir, "--artifacts-dir"))
        check_root(artifacts)
        folder = folder_of(lora, artifacts) if lora else artifacts / "checkpoints" / repo.rpartition("/")[2]
        return cls(repo, revision, layout, folder, artifacts, model, lora)

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns patterns of file names; the repository must hold a file for each pattern."""
        return tuple(PAIRS[self.lora].files.values()) if self.lora else _NEEDED[self.layout]


@dataclass(frozen=True)
class _Listing:
    """This class holds the hub's answer on the needed files of a commit: name -> bytes, and name -> hash."""

    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    sha256: dict[str, str]  # of large files only; the hash of a small file is git's

    def missing(self, folder: Path) -> list[str]:
        """Returns the files that are missing in `folder`, or have a wrong size there."""
        return [name for name, size in self.sizes.items() if _size(folder / name) != size]


def plan(request: DownloadRequest) -> dict[str, Any]:
    """Returns as JSON what `download` would fetch, and writes nothing. Raises the errors of `download`."""
    listing = _list(request)
    request = _from_cache(request, listing) or request
    _refuse_to_mix(request, listing)
    missing_bytes = _require_space(request, listing)
    return _result(request, listing) | {"missing_bytes": missing_bytes}


def download(request: DownloadRequest, *, progress: bool) -> dict[str, Any]:
    """Downloads the missing files, verifies all files, and returns a JSON object: the folder, the commit and the files.

    Raises ConfigError (a wrong option, no access, no space, another commit in the folder) and MissingArtifactError (the
    hub cannot be reached). Raises CorruptArtifactError if the repository or the download is incomplete or damaged.
    """
    started = time.perf_counter()
    listing = _list(request)
    if cached := _from_cache(request, listing):
        _verify_hashes(cached, listing, [])
        return _result(cached, listing) | {"seconds": round(time.perf_counter() - started, 3)}
    with _only_writer(request.folder):
        _refuse_to_mix(request, listing)
        _remove_orphans(request.folder)
        _require_space(request, listing)
        missing = listing.missing(request.folder)
        try:
            _fetch(request, listing, progress=progress)
        finally:
            with _hub_errors(request):
                share(request.folder)
        # huggingface_hub may return without an error and without files; its dry run does not notice a damaged file.
        _verify(request, listing)
        _verify_hashes(request, listing, missing)
        _write_manifest(request, listing)
    return _result(request, listing) | {"seconds": round(time.perf_counter() - started, 3)}


def _from_cache(request: DownloadRequest, listing: _Listing) -> DownloadRequest | None:
    """Returns the request with the folder of the Hugging Face cache, if that folder is complete and ours is empty."""
    if (
        request.lora
        or request.repo != REPOS[request.model][request.layout]
        or len(listing.missing(request.folder)) < len(listing.sizes)
    ):
        return None
    found = (folder for folder in snapshots(request.model, request.layout) if folder.name == listing.commit)
    folder = next((folder for folder in found if not listing.missing(folder)), None)
    return None if folder is None else dataclasses.replace(request, folder=folder)


def _list(request: DownloadRequest) -> _Listing:
    with _hub_errors(request, "run this command again"):  # nothing was fetched yet
        info = HfApi(endpoint=_endpoint()).model_info(
            request.repo, revision=request.revision, files_metadata=True, timeout=30
        )
    files = {file.rfilename: file for file in info.siblings or [] if _is_needed(file.rfilename, request.needed)}
    for pattern in request.needed:
        if not any(fnmatchcase(name, pattern) for name in files):
            if request.lora:
                raise CorruptArtifactError(
                    f"--lora {request.lora}: {request.repo} has no {pattern} at {info.sha}: use another --revision"
                )
            raise CorruptArtifactError(
                f"--repo {request.repo} has no {pattern} at {info.sha}: the repository is incomplete, or its layout is "
                f"not --layout {request.layout}; use another --repo, --revision or --layout"
            )
    sizes = {name: file.size for name, file in sorted(files.items())}
    if info.sha is None or None in sizes.values():
        raise CorruptArtifactError(
            f"{_endpoint()} does not report the commit and sizes of {request.repo}: check HF_ENDPOINT"
        )
    hashes = {name: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for name, file in sorted(files.items())}
    sha256 = {name: file.lfs.sha256 for name, file in files.items() if file.lfs}
    return _Listing(info.sha, {name: int(size or 0) for name, size in sizes.items()}, hashes, sha256)


def _is_needed(name: str, needed: tuple[str, ...]) -> bool:
    shards = [pattern for pattern in needed if pattern.endswith("/*.safetensors")]
    indices = [pattern.replace("*.safetensors", _INDEX) for pattern in shards]
    return any(fnmatchcase(name, pattern) for pattern in (*needed, *indices))


def _fetch(request: DownloadRequest, listing: _Listing, *, progress: bool) -> None:
    (enable_progress_bars if progress else disable_progress_bars)()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns about, we raise as an error
    with _hub_errors(request), warnings.catch_warnings(), _stoppable_bar() as bar:
        warnings.simplefilter("ignore")
        for name in listing.missing(request.folder):
            (request.folder / name).unlink(missing_ok=True)  # of a wrong size: the library may accept it as complete
        try:
            snapshot_download(
                request.repo,
                revision=listing.commit,
                local_dir=request.folder,
                allow_patterns=list(listing.sizes),
                endpoint=_endpoint(),
                tqdm_class=bar,
            )
        except RuntimeError as error:  # raised by hf_xet if the network fails
            raise ConnectionError(_first_line(error)) from error


@contextmanager
def _stoppable_bar() -> Iterator[type[tqdm]]:
    """Yields a class of progress bars with which Ctrl-C and SIGTERM stop the running downloads immediately.

    Without this class, each running download continues to the end of its file (10 GB).
    """
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return bool(super().update(n))

    def stop(number: int, frame: FrameType | None) -> Any:
        stopped.set()  # stops plain HTTP
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
    """Returns the hub's address, which every call gets, because huggingface_hub reads HF_ENDPOINT only at import."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _verify(request: DownloadRequest, listing: _Listing) -> None:
    """Checks that no file is missing or of a wrong size, and that no shard is missing that an index names."""
    for name in listing.missing(request.folder):
        size, wanted = _size(request.folder / name), listing.sizes[name]
        found = "is missing" if size is None else f"has {size} bytes, not {wanted}"
        raise CorruptArtifactError(f"{request.folder / name} {found} after the download: {_AGAIN}")
    for index in (name for name in listing.sizes if fnmatchcase(name, _INDEX)):
        folder = index.rpartition("/")[0]
        weight_map = read_object(request.folder / index, "use another --revision").get("weight_map")
        if not isinstance(weight_map, dict):
            raise CorruptArtifactError(f"{request.folder / index} is not an index of shards; use another --revision")
        for shard in sorted(set(map(str, weight_map.values()))):
            if f"{folder}/{shard}" not in listing.sizes:
                raise CorruptArtifactError(
                    f"--repo {request.repo} has no {folder}/{shard} at {listing.commit}, but its index names this "
                    "file; use another --revision"
                )


def _verify_hashes(request: DownloadRequest, listing: _Listing, fetched: list[str]) -> None:
    """Compares the files with the sha256 that the hub reports; they are remembered as the files' identities.

    A wrong file that was `fetched` now is removed. A file that was there before may be a user's own, and stays.
    """
    paths = {request.folder / name: name for name in listing.sha256}
    found = sha256_of(paths, request.artifacts)
    wrong = {path: name for path, name in paths.items() if found[path] != listing.sha256[name]}
    for path, name in wrong.items():
        if name in fetched:
            path.unlink()
    if not wrong:
        return
    where = ", ".join(map(str, wrong))
    if set(wrong.values()) <= set(fetched):
        raise CorruptArtifactError(
            f"{where}: downloaded and then removed, because the sha256 is not the one that the hub reports: {_AGAIN}"
        )
    raise CorruptArtifactError(
        f"{where}: the sha256 is not the one that the hub reports: save a copy of any file that you changed, remove "
        f"the files named here, and {_AGAIN}"
    )


def _refuse_to_mix(request: DownloadRequest, listing: _Listing) -> None:
    """Raises ConfigError if the folder holds another commit whose files differ."""
    path, fix = request.folder / MANIFEST, f"remove this file and {_AGAIN}"
    if not path.is_file():
        return
    held = read_object(path, fix)
    if not {"files", "repo", "commit"} <= held.keys():
        raise CorruptArtifactError(f"{path} is not the manifest of a download: {fix}")
    if held["files"] != _manifest_files(listing):
        raise ConfigError(
            f"--revision {request.revision}: {request.folder} holds {held['repo']} at {held['commit']}, but "
            f"{request.repo} at {listing.commit} has other files: remove that folder, or use another --artifacts-dir"
        )


def _write_manifest(request: DownloadRequest, listing: _Listing) -> None:
    manifest = {
        "repo": request.repo,
        "commit": listing.commit,
        **_kind(request),
        "files": _manifest_files(listing),
    }
    with _hub_errors(request):
        partial = request.folder / f".{MANIFEST}.part"
        write_synced(partial, json.dumps(manifest, indent=2) + "\n")
        partial.replace(request.folder / MANIFEST)


def _manifest_files(listing: _Listing) -> dict[str, Any]:
    return {name: {"bytes": size, "hash": listing.hashes[name]} for name, size in listing.sizes.items()}


def _require_space(request: DownloadRequest, listing: _Listing) -> int:
    """Returns the bytes of the missing files; raises ConfigError if the disk has less free space."""
    needed = sum(listing.sizes[name] for name in listing.missing(request.folder))
    existing = next(path for path in (request.folder, *request.folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"--artifacts-dir: the download needs {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free: "
            "free some space or choose another folder"
        )
    return needed


def _remove_orphans(folder: Path) -> None:
    """Removes the partial files of killed downloads; their names are random, so that no later download resumes them."""
    for orphan in (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        orphan.unlink(missing_ok=True)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_of(folder.parent / f".{folder.name}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"--artifacts-dir: another download writes to {folder}; wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--artifacts-dir: {folder} cannot be written ({hindrance(folder, error)}); choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _result(request: DownloadRequest, listing: _Listing) -> dict[str, Any]:
    return {
        "repo": request.repo,
        "commit": listing.commit,
        **_kind(request),
        "folder": str(request.folder),
        "files": listing.sizes,
        "bytes": sum(listing.sizes.values()),
    }


def _kind(request: DownloadRequest) -> dict[str, Any]:
    if request.lora is None:
        return {"layout": request.layout}
    return {"lora": request.lora, "options": words_of(request.lora, request.artifacts)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextmanager
def _hub_errors(
    request: DownloadRequest, again: str = f"{_AGAIN} (complete files are not downloaded twice)"
) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise ConfigError(
            f"--repo {request.repo!r} is not a repository name: give OWNER/NAME, as on the Hugging Face Hub"
        ) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        wraps = isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, (httpx2.HTTPError, OSError))
        raise _in_one_line(error.__cause__ if wraps and error.__cause__ else error, request, again) from error


def _in_one_line(error: BaseException, request: DownloadRequest, again: str) -> WanFastError:
    """Turns an error of huggingface_hub into one of ours, in one line that may end with what to do `again`.

    The order matters, because huggingface_hub's error for a gated repository is also one for a missing repository.
    """
    repo, page = request.repo, f"{_endpoint()}/{request.repo}"
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
                f"--repo {repo} does not exist or is private ({_endpoint()} answers {status}): "
                "fix the name, or set HF_TOKEN to a valid token"
            )
        return MissingArtifactError(f"{_endpoint()} answers {status} for {repo}: wait a little and {again}")
    if isinstance(error, OfflineModeIsEnabled):
        return MissingArtifactError(f"the download of {repo} needs the network: unset HF_HUB_OFFLINE and {again}")
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
        reason = _first_line(error)
        return MissingArtifactError(
            f"{_endpoint()} cannot be reached ({reason}): check the network, the proxy and HF_ENDPOINT, and {again}"
        )
    if isinstance(error, (httpx2.HTTPError, ConnectionError, TimeoutError)):
        return MissingArtifactError(f"the connection to {_endpoint()} was lost ({_first_line(error)}): {again}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ConfigError(f"--artifacts-dir: the disk of {request.folder} is full: free some space and {again}")
    if isinstance(error, OSError) and error.errno is not None:
        reason = hindrance(request.folder, error)
        return ConfigError(f"--artifacts-dir: {request.folder} cannot be written ({reason}): choose another folder")
    return CorruptArtifactError(f"the download of {repo} failed ({_first_line(error)}): {again}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
