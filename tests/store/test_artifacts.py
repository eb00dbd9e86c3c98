"""Tests the store: artifacts are published whole and once, found by content, and refused when changed."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from wanfast.runtime.errors import ConfigError, CorruptArtifactError
from wanfast.runtime.store.artifacts import Artifact, ArtifactStore, key_of, replace_text, write_synced

INPUTS = {"text": "Grüße", "n": 3}


def write(folder: Path) -> None:
    (folder / "data.txt").write_text("data")


def test_found_by_its_inputs_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.find("kind", INPUTS) is None
    folder = store.publish("kind", INPUTS, write).folder
    assert folder == tmp_path / "kind" / key_of(INPUTS)[:12]
    assert store.find("kind", dict(reversed(INPUTS.items()))) == folder
    assert store.find("kind", INPUTS | {"n": 4}) is None
    assert store.find("other", INPUTS) is None
    assert sorted(path.name for path in folder.iterdir()) == ["data.txt", "manifest.json"]


def test_never_overwritten(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.publish("kind", INPUTS, write).folder
    again = store.publish("kind", INPUTS, lambda _: pytest.fail("written again"))
    assert (again.folder, again.made_here) == (folder, False)


def test_a_second_writer_says_that_it_waits_and_takes_the_firsts(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    waits = threading.Event()
    found: list[Artifact] = []

    def publish_too() -> None:
        found.append(store.publish("kind", INPUTS, lambda _: pytest.fail("written twice"), waiting=waits.set))

    second = threading.Thread(target=publish_too)

    def write_slowly(folder: Path) -> None:
        second.start()
        assert waits.wait(10)
        write(folder)

    first = store.publish("kind", INPUTS, write_slowly)
    second.join(10)
    assert first.made_here and found == [Artifact(first.folder, made_here=False)]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise stop

    store = ArtifactStore(tmp_path)
    with pytest.raises(stop):
        store.publish("kind", INPUTS, fail)
    assert store.find("kind", INPUTS) is None
    assert [path.suffix for path in (tmp_path / "kind").iterdir()] in ([], [".lock"])
    assert store.publish("kind", INPUTS, write)


def manifest_with(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def hash_of(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shorter": lambda folder: (folder / "data.txt").write_text("dat"),
    "same size": lambda folder: (folder / "data.txt").write_text("dat!"),
    "gone": lambda folder: (folder / "data.txt").unlink(),
    "unreadable manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "deep manifest": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "a list as manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "other inputs": lambda folder: manifest_with(folder, inputs=INPUTS | {"n": 4}),
    "true instead of 1": lambda folder: manifest_with(folder, inputs=INPUTS | {"one": True}),
    "another key": lambda folder: manifest_with(folder, key="0" * 64),
    "another kind": lambda folder: manifest_with(folder, kind="other"),
    "no files listed": lambda folder: manifest_with(folder, files={}),
    "nothing in it": lambda folder: (manifest_with(folder, files={}), (folder / "data.txt").unlink()),
    "a file that is not listed": lambda folder: (folder / "more.txt").write_text("more"),
    "a hidden file that is not listed": lambda folder: (folder / ".more").write_text("more"),
    "a file in a folder that is not listed": lambda folder: (
        (folder / "sub").mkdir(),
        (folder / "sub/more").write_text("more"),
    ),
    "a link to the same bytes": lambda folder: (
        (folder / "data.txt").rename(folder.parent / "data.txt"),
        (folder / "data.txt").symlink_to(folder.parent / "data.txt"),
    ),
    "a linked folder": lambda folder: (folder / "sub").symlink_to(folder.parent),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a name that leads out": lambda folder: (
        (folder.parent / "out.txt").write_text("data"),
        manifest_with(folder, files={"data.txt": hash_of(b"data"), "../out.txt": hash_of(b"data")}),
    ),
    "an absolute name": lambda folder: (
        (folder / "data.txt").rename(folder.parent / "data.txt"),
        manifest_with(folder, files={str(folder.parent / "data.txt"): hash_of(b"data")}),
    ),
    "sizes without hashes": lambda folder: manifest_with(folder, files={"data.txt": 4}),
    "a file instead of the folder": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}
MADE_WITH = INPUTS | {"one": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_refused_or_made_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.publish("kind", MADE_WITH, write).folder
    DAMAGES[damage](folder)
    with pytest.raises(CorruptArtifactError, match=str(folder)) as refused:
        store.find("kind", MADE_WITH, verify=True)
    assert "\n" not in str(refused.value) and "remove this folder" in str(refused.value)
    if damage != "same size":
        with pytest.raises(CorruptArtifactError, match=str(folder)):
            store.publish("kind", MADE_WITH, lambda _: pytest.fail("replaced"))

    assert store.find("kind", MADE_WITH, verify=True, damaged="miss") is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"note: {folder}") and said.endswith("it is made again")
    assert store.publish("kind", MADE_WITH, write, damaged="miss") == Artifact(folder, made_here=True)
    assert store.find("kind", MADE_WITH, verify=True) == folder
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


def test_a_folder_without_end_of_its_making_does_not_stop_the_next(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (store.path("kind", INPUTS) / "sub").mkdir(parents=True)
    assert store.publish("kind", INPUTS, write, damaged="miss").made_here


def test_a_writer_may_not_leave_links(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(ValueError, match="data is neither a file nor a folder"):
        store.publish("kind", INPUTS, lambda folder: (folder / "data").symlink_to("/etc/hostname"))
    assert store.find("kind", INPUTS) is None


def test_what_is_of_no_use_is_discarded(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("kind", INPUTS, write)
    store.discard("kind", INPUTS)
    store.discard("kind", INPUTS)
    assert store.find("kind", INPUTS) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("write_file", [write_synced, replace_text])
def test_a_disk_that_takes_no_more_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_file: Callable[[Path, str], None], number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ConfigError, match=f"--artifacts-dir {tmp_path}/job.json: cannot be written") as said:
        write_file(tmp_path / "job.json", "text")
    assert os.strerror(number) in str(said.value) and "\n" not in str(said.value)
    assert ("free some space" in str(said.value)) == (number == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def _publish(root: Path, written: Path) -> None:
    def slowly(folder: Path) -> None:
        import time

        with written.open("a") as stream:
            stream.write("x")
        time.sleep(0.2)
        write(folder)

    ArtifactStore(root).publish("kind", INPUTS, slowly)


def test_two_writers_at_once_write_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_publish, args=(tmp_path, tmp_path / "written")) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert (tmp_path / "written").read_text() == "x"
