"""Tests that a set of files is written completely or not at all."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.small_files import assert_one_line, names_in
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.store.atomic import atomic_paths, not_written, partial_path, remove_partials


def test_atomic_paths_replaces_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_paths(target) as (partial,):
        partial.write_text("new")
        assert (target.read_text(), partial.parent, partial.name[0]) == ("old", tmp_path, ".")
    assert target.read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_paths(target) as (partial,):
        partial.write_text("never")
        raise ZeroDivisionError
    assert target.read_text() == "new"
    assert names_in(tmp_path) == ["a.json"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file/report", tmp_path / "file/a/b"):
        with pytest.raises(OSError) as caught:
            target.mkdir(parents=True)
        said = str(not_written(target, caught.value))
        reason = f"{tmp_path}/file is a file, not a folder"
        assert said == f"--output {target}: cannot be written ({reason}); choose another folder or name"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_only_a_full_disk_needs_space(tmp_path: Path, number: int) -> None:
    said = str(not_written(tmp_path / "a.mp4", OSError(number, os.strerror(number))))
    is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert os.strerror(number) in said and ("free some space" in said) == (" GB free" in said) == is_full


def test_atomic_paths_come_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "a.json"
    with pytest.raises(ConfigError, match="meanwhile"), atomic_paths(first, second, overwrite=False) as partials:
        for partial in partials:
            partial.write_text("new")
        second.write_text("another program's")
    assert names_in(tmp_path) == ["a.json"]
    with pytest.raises(ConfigError), atomic_paths(first, second) as partials:
        partials[0].write_text("new")  # the second file is never written
    assert names_in(tmp_path) == ["a.json"]
    with atomic_paths(first, second) as partials:
        for partial in partials:
            partial.write_text("new")
    assert (first.read_text(), second.read_text(), names_in(tmp_path)) == ("new", "new", ["a.json", "a.mp4"])


def test_a_rename_that_fails_is_undone(tmp_path: Path) -> None:
    first, second, third = tmp_path / "a.mp4", tmp_path / "a.json", tmp_path / "a.png"
    first.write_text("old")
    third.mkdir()
    with pytest.raises(ConfigError, match="Is a directory"), atomic_paths(first, second, third) as partials:
        for partial in partials:
            partial.write_text("new")
    assert first.read_text() == "old"
    assert names_in(tmp_path) == ["a.mp4", "a.png"]  # the second had no file before


def test_old_files_of_a_set_leave_no_second_name(tmp_path: Path) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "a.json"
    for number in range(2):
        with atomic_paths(first, second) as partials:
            for partial in partials:
                partial.write_text(str(number))
        assert (first.read_text(), second.read_text(), names_in(tmp_path)) == (str(number),) * 2 + (
            ["a.json", "a.mp4"],
        )


def test_a_link_that_leads_nowhere_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "nothing")
    with (
        pytest.raises(ConfigError, match="meanwhile"),
        atomic_paths(tmp_path / "a.json", overwrite=False) as (partial,),
    ):
        partial.write_text("new")
    assert (tmp_path / "a.json").is_symlink()


def test_atomic_paths_when_the_folder_went_away(tmp_path: Path) -> None:
    target = tmp_path / "gone" / "a.json"
    with pytest.raises(ConfigError) as caught, atomic_paths(target, option="--report") as (partial,):
        partial.write_text("x")
    assert_one_line(caught.value, "--report", target)


@pytest.mark.parametrize("existed", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize(("renames", "left"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_set_whose_process_was_killed_between_two_renames_is_the_old_one(
    tmp_path: Path, renames: int, left: str, existed: bool
) -> None:
    targets = [tmp_path / "a.mp4", tmp_path / "a.json"]
    for target in targets if existed else ():
        target.write_text("old")
    pid = os.fork()
    if pid == 0:
        try:
            replace, done = Path.replace, []

            def killed(path: Path, target: Path) -> None:
                if len(done) < renames:
                    replace(path, target)
                    done.append(target)
                if len(done) == renames:
                    os.kill(os.getpid(), signal.SIGKILL)

            Path.replace = killed  # type: ignore[method-assign, assignment]
            with atomic_paths(*targets) as partials:
                for partial in partials:
                    partial.write_text("new")
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert partial_path(targets[1], pid).exists() == (renames < 2)
    remove_partials([tmp_path / "other.mp4", *targets], [1, pid])
    expected = {"a.json": left, "a.mp4": left} if existed or left == "new" else {}
    assert {name: (tmp_path / name).read_text() for name in names_in(tmp_path)} == expected
