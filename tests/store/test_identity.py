"""Tests the identity of weights: each byte counts, each file is hashed once, and many processes may ask at once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.store import identity as module
from wanfast.runtime.store import model_files
from wanfast.runtime.store.identity import identity, is_old, sha256_of

LARGE = 1 << 16


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets files of this test count as large ones."""
    monkeypatch.setattr(module, "_SMALL_BYTES", LARGE)


@pytest.fixture
def weights(tmp_path: Path, small_is_large: None) -> Path:
    file = tmp_path / "model" / "weights.safetensors"
    file.parent.mkdir()
    file.write_bytes(os.urandom(2 * LARGE))
    return file


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Returns a list that grows by each file that this process hashes."""
    files: list[Path] = []
    hash_ = module._hash.__wrapped__
    monkeypatch.setattr(module, "_hash", lambda file, *others: files.append(file) or hash_(file, *others))
    return files


def changed(file: Path, offset: int) -> None:
    """Changes a byte, and restores the time of the last change as rsync does."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_byte_counts(tmp_path: Path) -> None:
    """A change between two of the 64 samples of earlier versions was not seen."""
    file = tmp_path / "expert.safetensors"
    file.write_bytes(bytes(100 << 20))
    before = identity([file], tmp_path / "artifacts")
    with file.open("r+b") as stream:
        stream.seek((100 << 20) * 10 // 63 + (1 << 17))
        stream.write(b"x" * (1 << 17))
    assert identity([file], tmp_path / "artifacts") != before


def test_a_copy_in_another_folder_has_the_same_identity(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(weights, tmp_path))
    assert identity([weights], tmp_path / "a") == identity([copy], tmp_path / "b")
    assert identity([copy], tmp_path / "a") != identity([copy.rename(tmp_path / "other")], tmp_path / "a")


def test_a_large_file_is_hashed_once_and_said(
    weights: Path, tmp_path: Path, hashed: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {weights: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert sha256_of([weights], tmp_path / "a") == wanted
    said = capsys.readouterr().err
    assert said.startswith(
        f"note: hashing 0.0 GB of weights in {weights.parent}: this is done only once, and takes at most about 1 s"
    )
    assert sha256_of([weights], tmp_path / "a") == wanted
    assert hashed == [weights] and capsys.readouterr().err == ""


@pytest.mark.parametrize("offset", [0, LARGE + 7, 2 * LARGE - 1])
def test_a_changed_file_is_hashed_again(weights: Path, tmp_path: Path, hashed: list[Path], offset: int) -> None:
    before = sha256_of([weights], tmp_path)
    changed(weights, offset)
    assert sha256_of([weights], tmp_path) == {weights: hashlib.sha256(weights.read_bytes()).hexdigest()} != before
    assert len(hashed) == 2


@pytest.mark.parametrize("record", ["", "{", "[]", "[" * 100_000, '{"sha256": "' + "0" * 64 + '"}', '{"sha256": 7}'])
def test_a_damaged_record_is_made_again(weights: Path, tmp_path: Path, hashed: list[Path], record: str) -> None:
    wanted = sha256_of([weights], tmp_path)
    (file,) = (tmp_path / "hashes").glob("*.json")
    file.write_text(record)
    assert sha256_of([weights], tmp_path) == wanted and len(hashed) == 2
    assert sha256_of([weights], tmp_path) == wanted and len(hashed) == 2


def test_small_files_leave_no_record(tmp_path: Path) -> None:
    files = model_files.locate("tiny", str(tmp_path))
    assert len(set(files.fingerprints.values())) == 5
    assert not any(map(is_old, files.fingerprints.values())) and is_old("0d0275e9101b9f83")
    assert list(tmp_path.iterdir()) == []


def _ask(weights: Path, artifacts: Path, asked: Path) -> None:
    hash_ = module._hash.__wrapped__

    def slowly(file: Path, state: tuple[tuple[str, object], ...], option: str) -> str:
        import time

        with asked.open("a") as stream:
            stream.write("x")
        time.sleep(0.5)
        return hash_(file, state, option)

    module._hash = slowly
    sha256_of([weights], artifacts)


def test_many_processes_hash_once(weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(weights, tmp_path / "a", tmp_path / "asked")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "asked").read_text() == "x"
    assert f"note: another process hashes {weights}: waiting for it" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_no_obstacle(weights: Path, tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "file").write_text("not a folder")
    for _ in range(2):
        assert sha256_of([weights], tmp_path / "file")[weights] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(hashed) == 2


def test_a_file_that_changes_meanwhile_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: changed(weights, 0) or digest(*a))
    with pytest.raises(ConfigError, match=f"--model: {weights} changes while it is read"):
        sha256_of([weights], tmp_path)


def test_a_new_link_to_a_file_that_is_read_changes_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes the time of change. What is remembered is the state after it, so the file is hashed only once more."""
    digest, read = hashlib.file_digest, []

    def linked(*arguments: Any) -> Any:
        if not read:
            (tmp_path / "link").hardlink_to(weights)
        read.append(arguments)
        return digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", linked)
    for _ in range(2):
        assert sha256_of([weights], tmp_path)[weights] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(read) == 2


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.unlink() or file.mkdir(), lambda file: file.chmod(0)]
)
def test_a_file_that_cannot_be_read_is_one_line(
    weights: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(weights)
    if os.access(weights, os.R_OK) and weights.is_file():
        pytest.skip("root can read every file")
    with pytest.raises(ConfigError, match=f"--model: {weights}") as said:
        sha256_of([weights], tmp_path)
    assert "\n" not in str(said.value)


def test_the_hugging_face_cache_names_files_by_their_sha256(
    tmp_path: Path, hashed: list[Path], small_is_large: None
) -> None:
    data = os.urandom(2 * LARGE)
    sha256 = hashlib.sha256(data).hexdigest()
    blob, link = tmp_path / "blobs" / sha256, tmp_path / "snapshots" / "c" / "weights.safetensors"
    blob.parent.mkdir()
    link.parent.mkdir(parents=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
    assert sha256_of([link], tmp_path / "a") == {link: sha256} and hashed == []
    assert json.loads(next((tmp_path / "a" / "hashes").glob("*.json")).read_text())["sha256"] == sha256
    changed(blob, LARGE)
    assert sha256_of([link], tmp_path / "a") == {link: hashlib.sha256(blob.read_bytes()).hexdigest()}
    assert hashed == [link]
