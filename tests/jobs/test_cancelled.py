"""Tests where a cancelled or killed job ends, and what its session and its files are afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.on_ranks import on_ranks
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.pixels import Frame
from wanfast.runtime.engine.session import Session, Sessions
from wanfast.runtime.errors import CancelledError, from_failure
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.jobs import generate
from wanfast.runtime.jobs.generate import FramesFile
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.processes import worker

State = tuple[str, int, int]


@pytest.fixture
def job(workdir: Path) -> Job:
    options = {"model": "tiny", "device": "cpu", "image": "cat.png", "prompt": "a cat", "seed": 1, "steps": 2}
    (plan,) = place([resolve({**options, "size": "64x64", "frames": 5}, writes=False)[0]])
    return plan.job()


def run(
    job: Job, sessions: Sessions, ends: Callable[[list[State]], bool] = lambda states: False
) -> tuple[dict[str, Any], list[State]]:
    """Returns the result and the reported progress of a job that is cancelled when `ends` says so."""
    states: list[State] = []

    def progress(index: int, *state: Any) -> None:
        states.append(state)
        if ends(states):
            raise CancelledError

    ((_, result),) = generate.run(
        [job], sessions, progress=progress, frames_of=lambda index: Path(f"frames/{index}.npy")
    )
    return result, states


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_job_is_cancelled_before_each_component(job: Job, count: int) -> None:
    sessions = Sessions(Ranks("cpu"))
    result, states = run(job, sessions, lambda states: len(states) == count)
    assert isinstance(from_failure(result), CancelledError)
    assert states == [("loading the models", 0, 0)] * count
    assert sessions._open is None or sessions._open._pipeline is None
    assert "frames" in run(job, sessions)[0]


def test_a_cancelled_job_keeps_the_models_and_is_not_decoded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(Ranks("cpu"))
    run(job, sessions)
    loaded = sessions.of(job.config)._pipeline
    assert loaded is not None
    monkeypatch.setattr(type(loaded), "frames", lambda *a: pytest.fail("a cancelled video was decoded"))
    for ends in (lambda states: states[-1][0] == "encoding the image", lambda states: states[-1][1:] == (2, 2)):
        assert isinstance(from_failure(run(job, sessions, ends)[0]), CancelledError)
    assert isinstance(from_failure(run(job, sessions, lambda states: True)[0]), CancelledError)
    assert sessions._open is not None and sessions._open._pipeline is loaded


@pytest.mark.parametrize(
    "state", [("loading the models", 0, 0), ("encoding the image", 0, 2), ("high noise", 0, 2), ("low noise", 2, 2)]
)
def test_a_rank_looks_for_the_cancel_file_at_every_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """The file comes after an earlier report with the same number of steps."""

    def reporting(*arguments: Any, progress: Callable[..., None], **named: Any) -> Iterator[None]:
        progress(0, "loading the models" if state[2] == 0 else "another stage", *state[1:])
        (tmp_path / "cancel").mkdir()
        (tmp_path / "cancel/7").touch()
        progress(0, *state)
        yield from ()

    monkeypatch.setattr(worker, "worker_half", lambda name: reporting)
    document = {"first": 0, "jobs": [], "worker": "any"}
    with pytest.raises(CancelledError):
        worker._do_batch(tmp_path, 0, tmp_path / "ranks/0-0", 7, document, Sessions(Ranks("cpu")), groups=1)


def test_no_rank_begins_a_batch_before_all_have_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was cancelled at once may end early, and then its file is removed."""
    seen: list[bool] = []

    def running(*arguments: Any, **named: Any) -> Iterator[None]:
        seen.append((tmp_path / "read").exists())
        yield from ()

    monkeypatch.setattr(worker, "worker_half", lambda name: running)
    document = {"first": 0, "jobs": [], "worker": "any"}

    def work(ranks: Ranks) -> list[bool]:
        if ranks.rank == 7:
            time.sleep(0.5)
            (tmp_path / "read").touch()
        worker._do_batch(tmp_path, 0, tmp_path / "ranks", 0, document, Sessions(ranks), groups=1)
        return seen

    assert on_ranks(Mesh(ulysses=8), work) == [[True]] * 8


def test_experts_are_evicted_only_where_the_text_encoder_is_about_to_load(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    evicted: list[int] = []
    monkeypatch.setattr(VideoPipeline, "make_room", lambda self, wanted: evicted.append(wanted))

    def work(ranks: Ranks) -> list[int]:
        counts = []
        for texts in (["stored"], ["stored"], ["new"], ["new", "another"]):
            session = Session.open(job.config, ranks)
            session.load()
            evicted.clear()
            session.encode([tuple(texts)])
            counts.append(len(evicted))
        return counts

    assert work(Ranks("cpu")) == [1, 0, 1, 1]
    shutil.rmtree("artifacts")
    assert on_ranks(Mesh(ulysses=2), work) == [[1, 0, 1, 1], [0, 0, 0, 0]]


def test_frames_are_written_whole_or_not_at_all(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    add = FramesFile.add

    def half(self: FramesFile, frames: Iterable[Frame]) -> None:
        add(self, list(frames)[:1])
        assert len(list(Path("frames").iterdir())) == 1  # a file under another name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FramesFile, "add", half)
        with pytest.raises(KeyboardInterrupt):
            run(job, Sessions(Ranks("cpu")))
    assert not list(Path("frames").iterdir())
    result, _ = run(job, Sessions(Ranks("cpu")))
    assert np.load(result["frames"]).shape[0] == 5
