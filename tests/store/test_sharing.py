"""Tests that the users of a group can share an artifacts folder: mode bits, and two real users where root runs this."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanfast.magcache_calib.measured import clip_file, read_clip, write_clip
from wanfast.runtime.planning import past_runs
from wanfast.runtime.processes.run_folder import new_run_folder, write_result
from wanfast.runtime.store import hub, identity
from wanfast.runtime.store.artifacts import ArtifactStore, replace_text
from wanfast.runtime.store.sharing import lock_of, locked, share, who_can_write

GROUP, FIRST, SECOND = 12300, 12345, 65534
INPUTS = {"n": 1}


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: os.umask(mask) and None
    os.umask(before)


def write_privately(folder: Path) -> None:
    """Writes as safetensors does, in nested folders too."""
    save_file({"embeds": torch.zeros(2)}, folder / "data.safetensors")
    (folder / "deep" / "deeper").mkdir(parents=True, mode=0o700)
    (folder / "deep" / "deeper" / "data").write_text("data")
    (folder / "deep" / "deeper" / "data").chmod(0o600)


def modes_below(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("mask", "folders", "files"), [(0o002, 0o775, 0o664), (0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_an_artifact_has_the_modes_of_the_umask(
    tmp_path: Path, umask: Callable[[int], None], mask: int, folders: int, files: int
) -> None:
    umask(mask)
    root = tmp_path / "artifacts"
    folder = ArtifactStore(root).publish("kind", INPUTS, write_privately).folder
    assert modes_below(root) == {folders, files}
    assert stat.S_IMODE((folder / "data.safetensors").stat().st_mode) == files
    assert stat.S_IMODE(folder.with_suffix(".lock").stat().st_mode) == files


def test_the_group_of_a_setgid_folder_is_inherited(tmp_path: Path, umask: Callable[[int], None]) -> None:
    umask(0o002)
    tmp_path.chmod(0o2775)
    folder = ArtifactStore(tmp_path).publish("kind", INPUTS, write_privately).folder
    assert modes_below(folder) == {0o2775, 0o664}


def test_links_and_the_files_of_others_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("")
    outside.chmod(0o600)
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "file").write_text("")
    (folder / "file").chmod(0o600)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 4242)
        share(folder)
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600
    share(folder)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) & 0o666
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600


def test_who_can_write_looks_at_owner_and_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    assert who_can_write([tmp_path]) is None
    tmp_path.chmod(0o757)
    assert who_can_write([tmp_path]) == f"other users can write {tmp_path}"
    tmp_path.chmod(0o775)
    assert who_can_write([tmp_path]) is None  # the primary group
    monkeypatch.setattr(os, "getegid", lambda: 4242)
    assert who_can_write([tmp_path]) == f"other users can write {tmp_path}"
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if tmp_path.stat().st_uid:
        assert who_can_write([tmp_path]) == f"{tmp_path} belongs to another user"


def as_user(uid: int, work: Callable[[], None]) -> None:
    """Runs `work` in a process of a user of the group, with the umask of people who share."""

    def run() -> None:
        os.setgroups([GROUP])
        os.setgid(uid)
        os.setuid(uid)
        os.umask(0o002)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.fixture
def shared() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders admit only root
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def test_two_users_share_an_artifact_of_any_kind(shared: Path) -> None:
    """The store shares whatever a kind's writer leaves in the folder; to the store, a kind is only a folder's name."""
    store, kind = ArtifactStore(shared / "artifacts"), "kind"

    def make() -> None:
        assert store.publish(kind, INPUTS, write_privately).made_here

    def use() -> None:
        assert store.find(kind, INPUTS, verify=True) == store.path(kind, INPUTS)
        assert not store.publish(kind, INPUTS, lambda _: pytest.fail("made twice")).made_here
        assert store.publish(kind, {"n": 2}, write_privately).made_here

    as_user(FIRST, make)
    as_user(SECOND, use)
    as_user(FIRST, lambda: store.find(kind, {"n": 2}, verify=True) or pytest.fail("missing"))


def test_one_user_replaces_what_another_left_damaged(shared: Path) -> None:
    store = ArtifactStore(shared / "artifacts")

    def damage() -> None:
        folder = store.publish("kind", INPUTS, write_privately).folder
        (folder / "data.safetensors").write_text("")
        (folder / "deep").chmod(0o700)  # its content cannot be deleted by the others
        (folder / "manifest.json").chmod(0o600)

    def replace() -> None:
        assert store.find("kind", INPUTS, verify=True, damaged="miss") is None
        assert store.publish("kind", INPUTS, write_privately, damaged="miss").made_here
        assert store.find("kind", INPUTS, verify=True)

    as_user(FIRST, damage)
    as_user(SECOND, replace)


def test_two_users_share_runs_and_locks(shared: Path) -> None:
    root = shared / "artifacts"

    def run() -> None:
        folder = new_run_folder(root, INPUTS)
        write_result(folder, 0, {"seconds": 1})
        with locked(shared / "x.lock"):
            pass

    def read() -> None:
        (result,) = (root / "runs").rglob("results/0.json")
        assert json.loads(result.read_text()) == {"seconds": 1}
        replace_text(result, "{}")
        lock = lock_of(shared / "x.lock", timeout=0)
        with lock:
            pass
        run()

    as_user(FIRST, run)
    as_user(SECOND, read)


def test_two_users_share_the_index_of_past_runs(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user appends to another's index, and replaces it when it is long."""
    monkeypatch.setattr(past_runs, "_MOST", 1)
    root = shared / "artifacts"
    entry = dict.fromkeys((*past_runs._ALIKE, "attention", "machine")) | {"seconds_a_forward": 1.5}
    monkeypatch.setattr(past_runs, "_entry", lambda result: entry)
    result = {"seconds": {"denoise": 2}, "first_step_s": 1}

    def run(before: int, after: int) -> Callable[[], None]:
        def work() -> None:
            new_run_folder(root, INPUTS)
            assert len(past_runs._entries(root / past_runs._INDEX)) == before
            past_runs.record(str(root), [result])
            assert len(past_runs._entries(root / past_runs._INDEX)) == after

        return work

    as_user(FIRST, run(0, 1))
    as_user(SECOND, run(1, 2))
    as_user(FIRST, run(2, 2))  # the last one before, and this one
    as_user(SECOND, run(2, 2))


def test_two_users_share_the_measurements_of_clips(shared: Path) -> None:
    store, inputs = ArtifactStore(shared / "artifacts"), {"steps": 1}
    kind = "magcache"
    measured = {"steps": [{"prompt": {"ratio": 1.0}, "negative_prompt": None}]}

    def use() -> None:
        assert read_clip(store, kind, inputs, bool) == measured
        clip_file(store, kind, inputs).write_text("")  # damaged: it is measured again
        assert read_clip(store, kind, inputs, bool) is None
        write_clip(store, kind, inputs, measured)
        write_clip(store, kind, {"steps": 2}, measured)

    as_user(FIRST, lambda: write_clip(store, kind, inputs, measured))
    as_user(SECOND, use)
    as_user(FIRST, lambda: write_clip(store, kind, {"steps": 2}, measured))
    as_user(FIRST, use)


def test_two_users_share_what_is_known_of_weights(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_SMALL_BYTES", 0)
    weights, artifacts = shared / "weights", shared / "artifacts"
    weights.write_text("weights")
    weights.chmod(0o644)

    def use() -> None:
        identity._hash = lambda *_: pytest.fail("hashed again")
        assert len(identity.sha256_of([weights], artifacts)[weights]) == 64

    def hash_again() -> None:
        (record,) = (artifacts / "hashes").glob("*.json")
        record.write_text("")  # damaged: the second user replaces it
        assert len(identity.sha256_of([weights], artifacts)[weights]) == 64

    as_user(FIRST, lambda: identity.sha256_of([weights], artifacts) and None)
    as_user(SECOND, use)
    as_user(SECOND, hash_again)
    as_user(FIRST, use)


def test_two_users_share_the_folder_of_a_download(shared: Path) -> None:
    request = hub.DownloadRequest.of(None, "main", "original", str(shared / "artifacts"))
    listing = hub._Listing("c" * 40, {"vae.pth": 3}, {"vae.pth": "0" * 64}, {})

    def fetch() -> None:
        with hub._only_writer(request.folder):
            (request.folder / "vae.pth").write_text("vae")
            (request.folder / "vae.pth").chmod(0o600)
            share(request.folder)
            hub._write_manifest(request, listing)

    def fetch_too() -> None:
        with hub._only_writer(request.folder):
            hub._refuse_to_mix(request, listing)
            hub._verify(request, listing)
            assert (request.folder / "vae.pth").read_text() == "vae"
            hub._write_manifest(request, listing)

    as_user(FIRST, fetch)
    as_user(SECOND, fetch_too)
    as_user(FIRST, fetch_too)
