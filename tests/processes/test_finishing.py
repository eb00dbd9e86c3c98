"""Tests that the files of a list's video are completed while the next video is made."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.processes.test_launch import SMALL, Start, gone, start, with_fault
from wanfast.runtime.engine import session
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Job
from wanfast.runtime.processes import worker
from wanfast.runtime.processes.run_folder import result_file
from wanfast.runtime.store.model_files import TINY

__all__ = ["start"]

# The files of the first video are not completed at the first try, and the second video meets a fault in its first step.
WAITS = """
import pathlib, time
from wanfast.runtime.engine import session
from wanfast.runtime.planning import sidecar

finish, make = sidecar.Recording.finish, session.Session.make

def waiting(self, document):
    if self._outputs[0].name == "1.mp4" and not pathlib.Path("tried").exists():
        self._encoder.close()  # the mp4 is whole, and not published
        pathlib.Path("tried").touch()
        time.sleep(1000)
    return finish(self, document)

def faulty(self, job, on_step, *others, **named):
    def stepped(done, expert):
        if job.config.video.prompt == "a fault" and done == 1:
            {fault}
        on_step(done, expert)
    return make(self, job, stepped, *others, **named)

sidecar.Recording.finish, session.Session.make = waiting, faulty
"""

# The file of the first video cannot be completed.
FAULTY_FILE = """
import os
from wanfast.runtime.planning import sidecar

finish = sidecar.Recording.finish

def faulty(self, document):
    if self._outputs[0].name == "1.mp4":
        {fault}
    return finish(self, document)

sidecar.Recording.finish = faulty
"""


def write_list(folder: Path, *lines: dict[str, Any]) -> list[Path]:
    """Writes a list of videos, and returns the files of their videos."""
    outputs = [folder / f"{number}.mp4" for number in range(1, len(lines) + 1)]
    named = [{"output": file.name, "steps": 2} | line for file, line in zip(outputs, lines, strict=True)]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    return outputs


def results(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out.strip().splitlines()[-1])["results"]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_video_is_denoised_before_the_file_of_the_video_before_is_complete(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    begun, finish, make = workdir / "begun", sidecar.Recording.finish, session.Session.make

    def waiting(self: sidecar.Recording, document: dict[str, Any]) -> dict[str, Any]:
        ends = time.monotonic() + 20
        while self._outputs[0].name == "1.mp4" and not begun.exists():
            assert time.monotonic() < ends, "the second video waits for the file of the first one"
            time.sleep(0.01)
        return finish(self, document)

    def noted(self: session.Session, job: Job, on_step: Any, *others: Any, **named: Any) -> session.Made:
        def stepped(done: int, expert: Any) -> None:
            if job.config.video.prompt == "second" and done:
                begun.touch()
            on_step(done, expert)

        return make(self, job, stepped, *others, **named)

    monkeypatch.setattr(sidecar.Recording, "finish", waiting)
    monkeypatch.setattr(session.Session, "make", noted)
    outputs = write_list(workdir, {}, {"prompt": "second"}, {})
    outcome = wanfast("generate", *SMALL, "--num-gpus", str(ranks), "--jobs", "jobs.jsonl", "--json")
    assert outcome.exit_code == 0, outcome.err
    assert [Path(result["output"]) for result in outcome.document["results"]] == outputs
    assert all(
        file.exists() and "output_sha256" in json.loads(file.with_suffix(".json").read_text()) for file in outputs
    )


def test_an_error_of_a_file_is_that_of_its_own_video(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = sidecar.Recording.finish

    def failing(self: sidecar.Recording, document: dict[str, Any]) -> dict[str, Any]:
        if self._outputs[0].name in ("1.mp4", "3.mp4"):
            time.sleep(0.2)
            raise ConfigError("--output: the disk is full")
        return finish(self, document)

    monkeypatch.setattr(sidecar.Recording, "finish", failing)
    outputs = write_list(workdir, {}, {}, {})
    outcome = wanfast("generate", *SMALL, "--jobs", "jobs.jsonl", "--json")
    errors = [result.get("error") for result in outcome.document["results"]]
    assert outcome.exit_code == 6 and errors == ["--output: the disk is full", None, "--output: the disk is full"]
    assert [file.exists() for file in outputs] == [False, True, False]
    assert not list(workdir.glob(".*.part"))


def test_the_bytes_of_a_list_are_those_of_single_videos(wanfast: Callable[..., Outcome], workdir: Path) -> None:
    outputs = write_list(workdir, {"seed": 1}, {"seed": 2}, {"seed": 3})
    assert wanfast("generate", *SMALL, "--jobs", "jobs.jsonl").exit_code == 0
    for seed, file in enumerate(outputs, 1):
        alone = ("--steps", "2", "--output", f"alone-{seed}.mp4")
        assert wanfast("generate", *SMALL, "--seed", str(seed), *alone).exit_code == 0
        assert file.read_bytes() == (workdir / f"alone-{seed}.mp4").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_is_killed_costs_no_video_whose_file_is_incomplete(start: Start, workdir: Path, ranks: int) -> None:
    """The first video is made again, because the second one killed the rank."""
    outputs = write_list(workdir, {}, {"prompt": "a fault"}, {})
    code = WAITS.format(fault="os.kill(os.getpid(), 9)")
    environment = with_fault(workdir, code, rank=0, replica=None)
    run = start(*SMALL, "--num-gpus", str(ranks), "--jobs", "jobs.jsonl", "--json", environment=environment)
    exit_code, out, err = run.end()
    assert exit_code == 6, err
    errors = [result.get("error", "") for result in results(out)]
    assert "rank 0 was killed by SIGKILL" in errors[1] and errors[::2] == ["", ""]
    assert (workdir / "tried").exists() and [file.exists() for file in outputs] == [True, False, True]
    assert not list(workdir.glob(".*.part"))


# Group X makes the first video while group Y makes the second one. X is killed while it loads the models of the third
# one. The file of the first video is incomplete then, and Y still lives.
LOADS = (
    WAITS.format(fault="pass")
    + """
import signal
load, slow = session.load_models, session.Session.make

def wait_for(name):
    ends = time.monotonic() + 30
    while not pathlib.Path(name).exists() and time.monotonic() < ends:
        time.sleep(0.01)

def held(self, job, on_step, *others, **named):
    def stepped(done, expert):
        if job.config.video.prompt == "second" and done == 1:
            pathlib.Path("begun").touch()
            wait_for("killed")
            time.sleep(0.5)
        if job.config.video.prompt == "first" and done == 1:
            wait_for("begun")
        on_step(done, expert)
    return slow(self, job, stepped, *others, **named)

def deadly(files, *others):
    if files.root.name == "deadly":
        wait_for("tried")
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return load(files, *others)

session.Session.make, session.load_models = held, deadly
"""
)


def test_a_group_that_is_killed_while_it_loads_makes_the_video_before_again(start: Start, workdir: Path) -> None:
    shutil.copytree(TINY, workdir / "deadly")
    outputs = write_list(workdir, {"prompt": "first"}, {"prompt": "second"}, {"model": "deadly"})
    groups = ("--num-gpus", "2", "--cfg-parallel", "1", "--ulysses", "1")
    environment = with_fault(workdir, LOADS, rank=0, replica=None)
    exit_code, out, err = start(*SMALL, *groups, "--jobs", "jobs.jsonl", "--json", environment=environment).end()
    assert exit_code == 6, err
    errors = [result.get("error", "") for result in results(out)]
    assert errors[:2] == ["", ""] and "was killed by SIGKILL" in errors[2]
    assert [file.exists() for file in outputs] == [True, True, False] and not list(workdir.glob(".*.part"))


def test_a_signal_leaves_no_incomplete_file_of_an_earlier_video(start: Start, workdir: Path) -> None:
    outputs = write_list(workdir, {}, {"prompt": "a fault"})
    environment = with_fault(workdir, WAITS.format(fault="pathlib.Path('begun').touch(); time.sleep(1000)"), rank=0)
    run = start(*SMALL, "--num-gpus", "2", "--jobs", "jobs.jsonl", "--json", environment=environment)
    while not (workdir / "begun").exists():
        assert run.process.poll() is None, run.end()
        time.sleep(0.02)
    children = run.children()
    assert list(workdir.glob(".1.mp4.*.part"))
    run.process.send_signal(signal.SIGINT)
    assert run.end(20)[0] == 130 and gone(children, 1)
    assert not list(workdir.glob(".*.part")) and not any(file.exists() for file in outputs)


@pytest.mark.parametrize("fault", ["os.kill(os.getpid(), 9)", "raise MemoryError"], ids=["killed", "no memory"])
def test_a_file_that_cannot_be_completed_costs_its_own_video(start: Start, workdir: Path, fault: str) -> None:
    """A rank that is killed may also cost the video that it had begun, but no more."""
    outputs = write_list(workdir, {}, {}, {}, {})
    environment = with_fault(workdir, FAULTY_FILE.format(fault=fault), rank=0, replica=None)
    exit_code, out, err = start(*SMALL, "--jobs", "jobs.jsonl", "--json", environment=environment).end()
    assert exit_code == 6, err
    errors = [result.get("error", "") for result in results(out)]
    if "kill" in fault:
        assert "rank 0 was killed by SIGKILL" in errors[0] and errors[2:] == ["", ""]
    else:
        assert "the files of this video could not be completed: MemoryError()" in errors[0] and errors[1:] == [""] * 3
    assert [file.exists() for file in outputs] == [not error for error in errors]
    assert not list(workdir.glob(".*.part"))


def test_an_unexpected_error_of_a_file_is_the_result_of_its_job(tmp_path: Path) -> None:
    def finish() -> dict[str, Any]:
        raise KeyError("a bug")

    with worker._Results(tmp_path, 0) as found:
        found.add(0, finish)
        found.add(1, {"made": True})
    documents = [json.loads(result_file(tmp_path, index).read_text()) for index in (0, 1)]
    assert documents[0]["exit_code"] == 5 and "KeyError('a bug')" in documents[0]["error"]
    assert documents[1] == {"made": True}
