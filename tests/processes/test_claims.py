"""Tests that one rank group gets a job, on every file system, and that no half of a claim exists."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.processes.test_losses import small_disk
from wanfast.runtime.processes.claims import claim, claimed_by, forget

__all__ = ["small_disk"]


def without_links(*arguments: object, **named: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_first_group_that_claims_a_job_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", without_links)
    assert claimed_by(tmp_path, 0) is None
    assert [claim(tmp_path, index, 7) for index in (0, 7, 1)] == [True] * 3
    assert [claim(tmp_path, index, 12) for index in (0, 1, 7, 12)] == [False] * 3 + [True]
    assert claim(tmp_path, 0, 7)  # as when a network file system sends the request for the link twice
    assert [claimed_by(tmp_path, index) for index in (0, 1, 2, 7, 12)] == [7, 7, None, 7, 12]
    for index in (0, 1, 2, 7, 12):
        forget(tmp_path, index)
    assert list((tmp_path / "claims").iterdir()) == [] and claim(tmp_path, 0, 12)


def test_a_kill_without_links_leaves_no_half_of_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", without_links)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            claim(tmp_path, 0, 7)
    assert claimed_by(tmp_path, 0) is None and claim(tmp_path, 0, 9) and claimed_by(tmp_path, 0) == 9


def test_a_claim_needs_no_space_of_a_full_disk(workdir: Path, small_disk: bool) -> None:
    if not small_disk:
        pytest.skip("only root can mount a small disk, so no disk was full")
    run_folder = workdir / "full"
    (run_folder / "claims").mkdir()
    with pytest.raises(OSError, match="No space left"), (run_folder / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    assert claim(run_folder, 0, 7) and claimed_by(run_folder, 0) == 7
