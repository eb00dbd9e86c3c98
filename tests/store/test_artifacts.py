"""Tests the store: artifacts are published whole and once, found by content, and refused when changed."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.store.artifacts import ArtifactStore, key_of, new_run_folder

INPUTS = {"text": "Grüße", "n": 3}


def write(folder: Path) -> None:
    (folder / "data.txt").write_text("data")


def test_found_by_its_inputs_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.find("kind", INPUTS) is None
    folder = store.publish("kind", INPUTS, write)
    assert folder == tmp_path / "kind" / key_of(INPUTS)[:12]
    assert store.find("kind", dict(reversed(INPUTS.items()))) == folder
    assert store.find("kind", INPUTS | {"n": 4}) is None
    assert store.find("other", INPUTS) is None
    assert sorted(path.name for path in folder.iterdir()) == ["data.txt", "manifest.json"]


def test_never_overwritten(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.publish("kind", INPUTS, write)
    assert store.publish("kind", INPUTS, lambda _: pytest.fail("written again")) == folder


def test_a_second_writer_says_that_it_waits_and_takes_the_firsts(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    waits = threading.Event()
    folders: list[Path] = []

    def publish_too() -> None:
        folders.append(store.publish("kind", INPUTS, lambda _: pytest.fail("written twice"), waiting=waits.set))

    second = threading.Thread(target=publish_too)

    def write_slowly(folder: Path) -> None:
        second.start()
        assert waits.wait(10)
        write(folder)

    folder = store.publish("kind", INPUTS, write_slowly)
    second.join(10)
    assert folders == [folder]


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


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest", "foreign"])
def test_what_was_changed_is_refused(tmp_path: Path, damage: str) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.publish("kind", INPUTS, write)
    if damage == "shorter":
        (folder / "data.txt").write_text("dat")
    elif damage == "gone":
        (folder / "data.txt").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        other = store.publish("kind", INPUTS | {"n": 4}, write)
        (folder / "manifest.json").write_text((other / "manifest.json").read_text())
    with pytest.raises(CorruptArtifactError, match=str(folder)):
        store.find("kind", INPUTS)


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


def test_run_folders_never_meet(tmp_path: Path) -> None:
    folders = {new_run_folder(tmp_path, INPUTS) for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)
