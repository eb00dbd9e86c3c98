"""Tests `wanfast download` against a real HTTP server on loopback that answers like the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any
from urllib.parse import unquote, urlparse

import httpx2
import pytest
from huggingface_hub import constants

from tests.conftest import Outcome
from wanfast.runtime.facts.choices import Layout
from wanfast.runtime.store import identity
from wanfast.runtime.store.hub_cache import PINNED, REPOS, snapshot_of
from wanfast.runtime.store.lora_pairs import PAIRS, words_of
from wanfast.runtime.store.model_files import checkpoints

Wanfast = Callable[..., Outcome]
ORIGINAL = "Wan-AI/Wan2.2-I2V-A14B"
DIFFUSERS = f"{ORIGINAL}-Diffusers"
SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
BIG = f"high_noise_model/{SHARD}"
INDEX_TEXT = json.dumps({"weight_map": {"a": SHARD}}).encode()


def expert(folder: str) -> dict[str, bytes]:
    return {f"{folder}/config.json": b"{}", f"{folder}/{INDEX}": INDEX_TEXT, f"{folder}/{SHARD}": folder.encode() * 9}


WANTED = {
    ORIGINAL: {
        **expert("high_noise_model"),
        **expert("low_noise_model"),
        BIG: bytes(range(256)) * 1000,
        "Wan2.1_VAE.pth": b"vae" * 100,
        "models_t5_umt5-xxl-enc-bf16.pth": b"t5" * 100,
        "google/umt5-xxl/tokenizer.json": b"{}",
    },
    DIFFUSERS: {
        **expert("transformer"),
        **expert("transformer_2"),
        **expert("vae"),
        **expert("text_encoder"),
        "model_index.json": b"{}",
        "tokenizer/tokenizer.json": b"{}",
    },
}
EXTRA = {"README.md": b"read me", "examples/cat.jpg": b"cat", "assets/logo.png": b"logo", "configuration.json": b"{}"}


@dataclass
class Hub:
    """Holds the server's files, its planned faults, and the requests that it received."""

    files: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {repo: files | EXTRA for repo, files in WANTED.items()}
    )
    commit: str = "c" * 40
    refusal: tuple[int, str] | None = None  # a status and an X-Error-Code for every request
    damage: dict[str, str] = field(
        default_factory=dict
    )  # file -> "cut": its first GET ends in the middle, "flip": it begins with a wrong byte
    slow: float = 0  # seconds per MiB
    sent: int = 0  # approximate bytes of files sent
    lies: dict[str, int | None] = field(default_factory=dict)  # file -> the size that the listing states
    requests: list[str] = field(default_factory=list)
    starts: dict[str, list[int]] = field(default_factory=dict)  # file -> the start of each of its GETs

    def fetched(self) -> list[str]:
        return [
            request.partition("/resolve/")[2].partition("/")[2]
            for request in self.requests
            if "GET" in request and "/resolve/" in request
        ]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlparse(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.refusal:
            return self.answer(b"", hub.refusal[0], {"X-Error-Code": hub.refusal[1]})
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo not in hub.files:
            return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        action, _, rest = path.partition(repo)[2].strip("/").partition("/")
        revision, _, name = rest.partition("/")
        if revision not in ("main", hub.commit, PINNED.get(repo)):
            return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        listing = [self.entry(name, data) for name, data in hub.files[repo].items()]
        if action == "revision":
            siblings = [
                {"rfilename": each["path"], "size": each["size"], "blobId": each["oid"], "lfs": each.get("lfs")}
                for each in listing
            ]
            return self.answer(json.dumps({"id": repo, "sha": hub.commit, "siblings": siblings}).encode())
        if action == "tree":
            return self.answer(json.dumps(listing).encode())
        return self.file(name, hub.files[repo][name])

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.hub.lies.get(name, len(data))
        facts = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith((".safetensors", ".pth")):
            digest = hashlib.sha256(data).hexdigest()
            facts["lfs"] = {"size": size, "oid": digest, "sha256": digest, "pointerSize": 100}
        return facts

    def file(self, name: str, data: bytes) -> None:
        first, _, _ = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, etag = int(first), hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit}
        damage = None
        if self.command == "GET":
            damage = self.hub.damage.pop(name, None)
            self.hub.starts.setdefault(name, []).append(start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if damage == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        self.answer(data[start:], 206 if start else 200, headers, cut=damage == "cut")

    def answer(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            for start in range(0, len(body), 2**20):
                self.wfile.write(body[start : start + (len(body) // 2 if cut else 2**20)])
                self.hub.sent += min(len(body), 2**20)
                time.sleep(self.hub.slow if len(body) > 2**20 else 0)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    cache = str(tmp_path_factory.mktemp("hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setenv("HF_HUB_CACHE", cache)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function that stops the server: then nothing listens at the hub's address."""

    def leave() -> None:
        with closing(socket()) as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")

    return leave


def folder_of(workdir: Path, repo: str = ORIGINAL) -> Path:
    return workdir / "artifacts" / "checkpoints" / repo.split("/")[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a checkpoint, without records of the hub's library and of wanfast."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not name.startswith((".cache", "wanfast-download"))
    }


def refused(outcome: Outcome, exit_code: int, *words: str) -> None:
    """Asserts that stderr is one error line that contains the words."""
    assert (outcome.exit_code, outcome.out) == (exit_code, ""), outcome.err
    assert outcome.err.startswith("error: ") and len(outcome.err.strip().splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_dry_run_lists_the_needed_files_and_writes_nothing(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    before = sorted(workdir.rglob("*"))
    outcome = wanfast("download", "--dry-run")
    assert outcome.exit_code == 0 and outcome.err == ""
    assert all(name in outcome.out for name in WANTED[ORIGINAL])
    assert not any(name in outcome.out for name in EXTRA)
    document = wanfast("download", "--dry-run", "--json").document
    assert document["files"] == {name: len(data) for name, data in WANTED[ORIGINAL].items()}
    assert document["missing_bytes"] == document["bytes"] == sum(map(len, WANTED[ORIGINAL].values()))
    assert sorted(workdir.rglob("*")) == before
    assert hub.fetched() == []


@pytest.mark.parametrize("repo", [ORIGINAL, DIFFUSERS], ids=["original", "diffusers"])
def test_what_is_needed_comes_once_and_is_recorded(wanfast: Wanfast, workdir: Path, hub: Hub, repo: str) -> None:
    arguments = ("download", "--json", *(("--layout", "diffusers") if repo == DIFFUSERS else ()))
    outcome = wanfast(*arguments)
    assert outcome.exit_code == 0, outcome.err
    assert "%" not in outcome.err, "a progress bar where nobody watches"
    assert contents(folder_of(workdir, repo)) == WANTED[repo]
    assert sorted(hub.fetched()) == sorted(WANTED[repo])
    document = outcome.document
    assert document.keys() == {"repo", "commit", "layout", "folder", "files", "bytes", "seconds"}
    assert (document["repo"], document["commit"]) == (repo, hub.commit)
    assert document["folder"] == str(folder_of(workdir, repo))
    manifest = json.loads((folder_of(workdir, repo) / "wanfast-download.json").read_text())
    assert (manifest["repo"], manifest["commit"], manifest["layout"]) == (repo, hub.commit, document["layout"])
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == document["files"]
    hub.requests.clear()
    assert wanfast(*arguments).exit_code == 0
    assert len(hub.requests) == 1, hub.requests


def test_a_cut_connection_goes_on_where_it_was(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # instead of 10 MiB: a cut loses at most this much
    hub.damage[BIG] = "cut"
    outcome = wanfast("download")
    assert outcome.exit_code == 0 and outcome.err == ""
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]
    first, second = hub.starts[BIG]
    assert first == 0 and 0 < second <= len(WANTED[ORIGINAL][BIG]) // 2


def test_whole_files_are_kept_and_a_short_one_is_downloaded_again(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    assert wanfast("download").exit_code == 0
    (folder_of(workdir) / "Wan2.1_VAE.pth").write_bytes(b"v")
    (folder_of(workdir) / "low_noise_model" / "config.json").unlink()
    hub.requests.clear()
    assert wanfast("download").exit_code == 0
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]
    assert sorted(hub.fetched()) == ["Wan2.1_VAE.pth", "low_noise_model/config.json"]


REFUSALS: dict[str, tuple[tuple[int, str], int, str]] = {
    "401": ((401, ""), 2, "HF_TOKEN"),
    "403": ((403, ""), 2, "HF_TOKEN"),
    "404": ((404, ""), 2, "fix the name"),
    "gated": ((403, "GatedRepo"), 2, "is gated: accept its terms"),
    "500": ((500, ""), 3, "answers 500"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("filled", [False, True], ids=["fresh", "not empty"])
def test_a_refusal_of_the_hub_is_one_line(wanfast: Wanfast, workdir: Path, hub: Hub, name: str, filled: bool) -> None:
    if filled:
        folder_of(workdir).mkdir(parents=True)
        (folder_of(workdir) / "note.txt").write_text("so that the library returns without an error")
    hub.refusal, exit_code, words = REFUSALS[name]
    refused(wanfast("download"), exit_code, words)
    assert not (folder_of(workdir) / "wanfast-download.json").exists()


def test_wrong_options_are_named(wanfast: Wanfast, hub: Hub) -> None:
    refused(wanfast("download", "--repo", "Wan-AI/Wan9"), 2, "--repo Wan-AI/Wan9", "404")
    refused(wanfast("download", "--revision", "gone"), 2, "--revision gone")
    refused(wanfast("download", "--repo", "a/b/c"), 2, "--repo 'a/b/c'")
    refused(wanfast("download", "--repo", ""), 2, "--repo")
    refused(wanfast("download", "--layout", "diffusers", "--repo", ORIGINAL), 4, "model_index.json", "--layout")


@pytest.mark.parametrize("filled", [False, True], ids=["fresh", "complete"])
def test_no_network_is_an_error_even_where_files_lie(
    wanfast: Wanfast, workdir: Path, hub: Hub, nobody: Callable[[], None], filled: bool
) -> None:
    if filled:
        assert wanfast("download").exit_code == 0
    nobody()
    refused(wanfast("download"), 3, "cannot be reached", "HF_ENDPOINT")
    refused(wanfast("download", "--dry-run"), 3, "cannot be reached", "and run this command again\n")


def test_offline_by_choice(wanfast: Wanfast, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(wanfast("download"), 3, "unset HF_HUB_OFFLINE")


def test_the_library_may_return_without_the_files(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanfast.runtime.store.hub.snapshot_download", lambda *_, local_dir, **__: str(local_dir))
    refused(wanfast("download"), 4, "Wan2.1_VAE.pth", "is missing after the download")
    assert not (folder_of(workdir) / "wanfast-download.json").exists()


def test_a_repository_that_is_not_whole(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    del hub.files[ORIGINAL]["Wan2.1_VAE.pth"]
    refused(wanfast("download"), 4, "Wan2.1_VAE.pth")
    assert not folder_of(workdir).exists()


def test_a_shard_that_only_the_index_knows(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.files[ORIGINAL][f"low_noise_model/{INDEX}"] = INDEX_TEXT.replace(b"00001-of", b"00002-of")
    refused(wanfast("download"), 4, "low_noise_model/diffusion_pytorch_model-00002-of-00001.safetensors")


def test_sizes_are_compared_in_the_end(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.lies["Wan2.1_VAE.pth"] = 301
    refused(wanfast("download"), 4, "Wan2.1_VAE.pth has 300 bytes, not 301")
    assert not (folder_of(workdir) / "wanfast-download.json").exists()


def test_downloaded_files_are_compared_with_their_hashes(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.damage[BIG] = "flip"
    message = f"{folder_of(workdir) / BIG}: downloaded and then removed"
    refused(wanfast("download"), 4, message, "the sha256 is not the one that the hub reports")
    assert contents(folder_of(workdir)) == {name: data for name, data in WANTED[ORIGINAL].items() if name != BIG}
    assert not (folder_of(workdir) / "wanfast-download.json").exists()
    hub.requests.clear()
    assert wanfast("download").exit_code == 0
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]
    assert hub.fetched() == [BIG]


def test_a_file_that_was_there_is_compared_too_and_stays(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    assert wanfast("download").exit_code == 0
    file = folder_of(workdir) / BIG
    mine = bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    file.write_bytes(mine)
    refused(wanfast("download"), 4, f"{file}: the sha256 is not the one that the hub reports: save a copy")
    assert file.read_bytes() == mine
    file.unlink()
    assert wanfast("download").exit_code == 0 and contents(folder_of(workdir)) == WANTED[ORIGINAL]


def test_what_was_verified_is_not_hashed_again(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SMALL_BYTES", 1000)
    outcome = wanfast("download")
    assert outcome.exit_code == 0 and outcome.err.startswith("note: hashing 0.0 GB of weights in")
    monkeypatch.setattr(identity, "_hash", lambda *_: pytest.fail("hashed again"))
    monkeypatch.setattr(identity, "_SMALL_BYTES", 0)
    (record,) = (workdir / "artifacts" / "hashes").glob("*.json")
    assert json.loads(record.read_text())["sha256"] == hashlib.sha256(WANTED[ORIGINAL][BIG]).hexdigest()
    file = folder_of(workdir) / BIG
    assert identity.sha256_of([file], workdir / "artifacts")[file] == json.loads(record.read_text())["sha256"]


def test_a_group_can_share_a_download(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    before = os.umask(0o002)
    try:
        assert wanfast("download").exit_code == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (workdir / "artifacts").rglob("*")}
    assert modes == {0o775, 0o664}


def in_the_cache(hub: Hub, commit: str, files: dict[str, bytes]) -> Path:
    """Puts files into the cache of the hub's library, and returns their folder."""
    snapshot = snapshot_of(ORIGINAL, commit)
    for name, data in files.items():
        blob = snapshot.parents[1] / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_what_the_cache_holds_is_read_in_place(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.commit = PINNED[ORIGINAL]
    snapshot = in_the_cache(hub, hub.commit, WANTED[ORIGINAL])
    assert wanfast("download", "--dry-run", "--json").document["missing_bytes"] == 0
    document = wanfast("download", "--json").document
    assert document["folder"] == str(snapshot) and hub.fetched() == []
    assert not folder_of(workdir).exists()

    blob = (snapshot / BIG).resolve()
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    refused(wanfast("download"), 4, "the sha256 is not the one that the hub reports")


def test_a_cache_that_lacks_a_file_is_not_used(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.commit = PINNED[ORIGINAL]
    in_the_cache(hub, hub.commit, {name: data for name, data in WANTED[ORIGINAL].items() if name != BIG})
    assert wanfast("download", "--json").document["folder"] == str(folder_of(workdir))
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]


def test_too_little_disk_is_known_before(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(wanfast("download"), 2, "--artifacts-dir", "GB free")
    refused(wanfast("download", "--dry-run"), 2, "GB free")
    assert hub.fetched() == []


def test_what_is_there_needs_no_room(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wanfast("download").exit_code == 0
    (folder_of(workdir) / "Wan2.1_VAE.pth").unlink()
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert wanfast("download").exit_code == 0
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]


MEANWHILE: dict[str, tuple[Exception, int, str]] = {
    "disk full": (OSError(28, "No space left on device"), 2, "is full"),
    "disk read-only": (OSError(30, "Read-only file system"), 2, "Read-only"),
    "connection reset": (httpx2.ReadError("reset by peer"), 3, "was lost (reset by peer)"),
    "connection silent": (httpx2.ReadTimeout("timed out"), 3, "was lost (timed out)"),
    "connection of hf_xet": (RuntimeError("network"), 3, "was lost (network)"),
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_a_failure_in_the_middle_is_one_line(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    error, exit_code, words = MEANWHILE[name]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    refused(wanfast("download"), exit_code, words)
    assert not list(workdir.rglob("*.incomplete"))


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_download_stops_at_once(workdir: Path, hub: Hub, number: signal.Signals, exit_code: int) -> None:
    hub.slow = 0.1  # 6 s in total
    hub.files[ORIGINAL][BIG] = bytes(60 * 2**20)
    process = subprocess.Popen(
        [sys.executable, "-m", "wanfast", "download"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 20
        while hub.sent < 4 * 2**20:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        started = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == exit_code and len(said.strip().splitlines()) == 1, said
    assert time.monotonic() - started < 4
    assert not list(workdir.rglob("*.incomplete"))


def test_signals_are_handled_as_before_a_download() -> None:
    from wanfast.runtime.store.hub import _stoppable_bar

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with _stoppable_bar():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_killed_download_left_is_removed(
    wanfast: Wanfast, workdir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = folder_of(workdir) / ".cache/huggingface/download/high_noise_model/x.abc.12345678.incomplete"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"part")
    assert wanfast("download", "--dry-run").exit_code == 0 and orphan.exists()
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0 if orphan.exists() else 10**9))
    assert wanfast("download").exit_code == 0  # the orphan was removed, so the disk has enough space
    assert not list(workdir.rglob("*.incomplete"))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_model_from_text_has_repositories_of_its_own(wanfast: Wanfast, hub: Hub, layout: Layout) -> None:
    repo = REPOS["t2v-a14b"][layout]
    hub.files[repo] = hub.files[REPOS["a14b"][layout]]
    outcome = wanfast("download", "--model", "t2v-a14b", "--layout", layout, "--json")
    assert outcome.exit_code == 0, outcome.err
    assert outcome.document["folder"] == str(Path("artifacts", checkpoints("t2v-a14b", layout)).absolute())
    assert f"GET /api/models/{repo}/revision/{PINNED[repo]}" in hub.requests
    refused(wanfast("download", "--model", "a14b", "--repo", "a/b"), 2, "--model and --repo exclude each other")
    refused(wanfast("download", "--model", "a14b", "--lora", "lightx2v-1022"), 2, "--model and --lora exclude each")


def test_the_published_repositories_are_pinned(wanfast: Wanfast, hub: Hub) -> None:
    for layout, repo in (("original", ORIGINAL), ("diffusers", DIFFUSERS)):
        assert wanfast("download", "--layout", layout, "--dry-run").exit_code == 0
        assert hub.requests[-1] == f"GET /api/models/{repo}/revision/{PINNED[repo]}"
    hub.files["me/fork"] = hub.files[ORIGINAL]
    assert wanfast("download", "--repo", "me/fork", "--dry-run").exit_code == 0
    assert hub.requests[-1].endswith("/me/fork/revision/main")


def test_two_commits_do_not_mix(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    main = ("download", "--revision", "main")
    assert wanfast(*main).exit_code == 0
    old, hub.commit = hub.commit, "d" * 40
    hub.files[ORIGINAL]["README.md"] = b"new words, same weights"
    assert wanfast(*main, "--json").document["commit"] == hub.commit
    hub.commit = "e" * 40
    hub.files[ORIGINAL]["Wan2.1_VAE.pth"] = b"VAE" * 100  # of the same size
    for arguments in ((), ("--dry-run",)):
        refused(wanfast(*main, *arguments), 2, "--revision main", "d" * 40, "e" * 40)
    assert contents(folder_of(workdir)) == WANTED[ORIGINAL]
    assert old not in (folder_of(workdir) / "wanfast-download.json").read_text()


@pytest.mark.parametrize("record", ["{", "[]", "{}", "[" * 100_000], ids=["cut off", "list", "empty", "deep"])
def test_a_record_that_cannot_be_read_is_named(wanfast: Wanfast, workdir: Path, hub: Hub, record: str) -> None:
    folder_of(workdir).mkdir(parents=True)
    (folder_of(workdir) / "wanfast-download.json").write_text(record)
    refused(wanfast("download"), 4, "wanfast-download.json", "remove this file and run the download again")


def test_a_hub_that_reports_no_sizes(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    hub.lies["Wan2.1_VAE.pth"] = None
    refused(wanfast("download"), 4, "does not report the commit and sizes", "HF_ENDPOINT")
    assert not folder_of(workdir).exists()


def test_one_download_at_a_time(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    from wanfast.runtime.store.hub import _only_writer

    with _only_writer(folder_of(workdir)):
        refused(wanfast("download"), 2, "another download")


def test_generate_finds_what_came(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    assert wanfast("download").exit_code == 0
    assert workdir / "artifacts" / checkpoints("a14b", "original") == folder_of(workdir)


def test_generate_finds_the_other_layout_too(
    wanfast: Wanfast, workdir: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.public_model import save_diffusers
    from wanfast.runtime.errors import MissingArtifactError
    from wanfast.runtime.store.model_files import locate

    public = tmp_path_factory.mktemp("public")
    save_diffusers(public)
    hub.files[DIFFUSERS] = {str(path.relative_to(public)): path.read_bytes() for path in public.rglob("*.*")}
    folder_of(workdir).mkdir(parents=True)  # a refused download leaves this folder
    assert wanfast("download", "--layout", "diffusers").exit_code == 0
    files = locate("a14b", "artifacts")
    assert (files.root, files.layout) == (folder_of(workdir, DIFFUSERS), "diffusers")
    files.require()
    (files.root / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingArtifactError, match=r"run `wanfast download --layout diffusers`"):
        files.require()
    (folder_of(workdir) / "high_noise_model").mkdir()
    files = locate("a14b", "artifacts")
    assert (files.root, files.layout) == (folder_of(workdir), "original")


def test_errors_are_json_too(wanfast: Wanfast, hub: Hub) -> None:
    outcome = wanfast("download", "--revision", "gone", "--json")
    assert outcome.document["exit_code"] == outcome.exit_code == 2


def with_pair(hub: Hub, name: str) -> dict[str, bytes]:
    """Puts a pair of LoRAs on the hub, beside other files of the same repository, and returns the pair's files."""
    wanted = {file: expert.encode() * 99 for expert, file in PAIRS[name].files.items()}
    others = {"README.md": b"read me", "old/high_noise_model.safetensors": b"old", "other.safetensors": b"other"}
    hub.files[PAIRS[name].repo] = wanted | others
    return wanted


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_loras_comes_into_its_own_folder(wanfast: Wanfast, workdir: Path, hub: Hub, name: str) -> None:
    wanted = with_pair(hub, name)
    dry = wanfast("download", "--lora", name, "--dry-run", "--json").document
    assert dry["files"] == {file: len(data) for file, data in wanted.items()} and hub.fetched() == []
    outcome = wanfast("download", "--lora", name, "--json")
    assert outcome.exit_code == 0, outcome.err
    folder, document = workdir / "artifacts" / "loras" / name, outcome.document
    assert contents(folder) == wanted and sorted(hub.fetched()) == sorted(wanted)
    assert document["folder"] == str(folder) and document["lora"] == name and "layout" not in document
    high, low = PAIRS[name].files["high_noise"], PAIRS[name].files["low_noise"]
    assert document["options"] == f"--lora-high-noise {folder / high} --lora-low-noise {folder / low}"
    assert json.loads((folder / "wanfast-download.json").read_text())["lora"] == name
    hub.requests.clear()
    again = wanfast("download", "--lora", name)
    assert again.out.endswith(
        f"`wanfast generate` uses this pair of LoRAs with {words_of(name, workdir / 'artifacts')}\n"
    )
    assert hub.fetched() == []


def test_the_names_of_published_pairs() -> None:
    """The repositories and files as their publisher names them."""
    seko = "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1"
    assert {(pair.repo, *pair.files.values()) for pair in PAIRS.values()} == {
        (
            "lightx2v/Wan2.2-Lightning",
            f"{seko}/high_noise_model.safetensors",
            f"{seko}/low_noise_model.safetensors",
        ),
        (
            "lightx2v/Wan2.2-Distill-Loras",
            "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
            "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors",
        ),
    }


def test_a_damaged_or_missing_lora_is_an_error(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    wanted = with_pair(hub, "lightx2v-1022")
    high = PAIRS["lightx2v-1022"].files["high_noise"]
    hub.damage[high] = "flip"
    refused(
        wanfast("download", "--lora", "lightx2v-1022"),
        4,
        f"{high}: downloaded and then removed",
        "the sha256 is not the one",
    )
    del hub.files[PAIRS["lightx2v-1022"].repo][high]
    words = (f"--lora lightx2v-1022: {PAIRS['lightx2v-1022'].repo} has no {high}", "use another --revision")
    refused(wanfast("download", "--lora", "lightx2v-1022"), 4, *words)
    hub.files[PAIRS["lightx2v-1022"].repo] |= wanted
    assert wanfast("download", "--lora", "lightx2v-1022").exit_code == 0


def test_wrong_options_of_a_pair_are_named(wanfast: Wanfast, hub: Hub) -> None:
    refused(
        wanfast("download", "--lora", "seko"),
        2,
        "--lora 'seko' is not the name of a published pair of LoRAs: use lightning-seko-v1 or",
    )
    refused(wanfast("download", "--lora", "lightx2v-1022", "--repo", "a/b"), 2, "--repo and --lora exclude each other")
    refused(
        wanfast("download", "--lora", "lightx2v-1022", "--layout", "original"), 2, "--layout and --lora exclude each"
    )
    with_pair(hub, "lightx2v-1022")
    refused(wanfast("download", "--lora", "lightx2v-1022", "--revision", "gone"), 2, "--revision gone")


def test_a_downloaded_pair_is_the_one_that_a_refusal_names(wanfast: Wanfast, workdir: Path, hub: Hub) -> None:
    with_pair(hub, "lightning-seko-v1")
    video = ("generate", "--device", "cpu", "--image", "cat.png", "--prompt", "a", "--recipe", "lightning-4")
    assert "run `wanfast download --lora lightning-seko-v1`, then add" in wanfast(*video, "--dry-run").err
    assert wanfast("download", "--lora", "lightning-seko-v1").exit_code == 0
    options = words_of("lightning-seko-v1", workdir / "artifacts")
    refused(wanfast(*video, "--dry-run"), 2, f"needs distilled weights of both experts: add `{options}`")
