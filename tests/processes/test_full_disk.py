"""Tests that a disk of artifacts that becomes full costs at most the lines that it holds nothing of."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wanfast.commands import dispatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.processes import launch, worker
from wanfast.runtime.processes.pace import works

Batch = Callable[[], None]


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Returns a function that does two jobs of two steps in this process, as a rank of group 0."""

    def jobs(*arguments: object, progress: Callable[..., None], **named: object) -> Iterator[tuple[int, Any]]:
        for index in range(2):
            progress(index, "low noise", 1, 2)
            yield index, {"output": f"{index}.mp4"}

    monkeypatch.setattr(worker, "worker_half", lambda module: jobs)
    monkeypatch.setenv("LOCAL_RANK", "0")
    document = {"worker": "", "jobs": [], "first": 0}
    return lambda: worker._do_batch(tmp_path, 0, tmp_path / "ranks/0-0", 0, document, Sessions(Ranks("cpu")), 1)


def test_a_line_whose_result_cannot_be_written_is_lost_alone(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **named: Any) -> int:
        if path.name.startswith(".0.json") and path.parent.name == "results":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **named)

    monkeypatch.setattr(Path, "write_text", full)
    batch()
    results: dict[int, dict[str, Any]] = {}
    assert launch._collect(tmp_path, range(2), results) == [0, 1]
    assert "results/0.json: the result of this job could not be written" in results[0]["error"]
    assert results[1] == {"output": "1.mp4"}


def test_progress_that_cannot_be_written_costs_no_line(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch()
    files = (tmp_path / "progress/0.json", tmp_path / "ranks/0-0/progress")
    before = [(file.read_text(), file.stat().st_mtime_ns) for file in files]

    def full(path: Path, *arguments: object, **named: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    batch()
    after = [(file.read_text(), file.stat().st_mtime_ns) for file in files]
    assert all(new[0] == old[0] and new[1] > old[1] for old, new in zip(before, after, strict=True))


def test_a_rank_that_cannot_create_its_progress_does_not_hang(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "ranks/0-0/pid"
    pid.parent.mkdir(parents=True)
    pid.write_text(str(os.getppid()))  # whose other work does not matter
    os.utime(pid, (0, 0))

    def full(path: Path, *arguments: object, **named: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    batch()
    assert not (tmp_path / "progress/0.json").exists()
    assert works(tmp_path, 0, 1, on_cpu=False)[os.getppid()].reported_ns > 0


def test_one_process_needs_no_record_of_its_results(
    workdir: Path, wanfast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(*arguments: Any) -> Path:
        folder = new_run_folder(*arguments)
        (folder / "results").write_text("no folder")
        (folder / "result.json").mkdir()
        return folder

    new_run_folder = dispatch.new_run_folder
    monkeypatch.setattr(dispatch, "new_run_folder", unwritable)
    tiny = ("--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--device", "cpu", "--size", "64x64")
    outcome = wanfast("generate", *tiny, "--frames", "5", "--steps", "1", "--output", "one.mp4")
    assert outcome.exit_code == 0, outcome.err
    assert "results/0.json: cannot be written" in outcome.err and (workdir / "one.mp4").exists()
