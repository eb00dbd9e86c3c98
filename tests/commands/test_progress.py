"""Tests what a command shows of its progress: bars on a terminal, and lines in a pipe or a file."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from wanfast.commands import progress
from wanfast.runtime.planning.progress import LOADING

Wanfast = Callable[..., Outcome]
VIDEO = ("generate", "--model", "tiny", "--device", "cpu", "--image", "cat.png", "--size", "64x48", "--frames", "5")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets 40 s pass between two reports."""
    seconds = iter(range(0, 100_000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(seconds))


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Returns a function that returns what would be printed now."""
    lines: list[Callable[[], str]] = []

    @contextmanager
    def printed(text: Callable[[], str]) -> Iterator[None]:
        lines.append(text)
        yield

    monkeypatch.setattr(progress, "_printed", printed)
    return lambda: lines[-1]()


@pytest.mark.usefixtures("clock")
def test_bars_show_pace_and_time_left_however_slow_a_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    with progress.job_progress(["out.mp4"], lambda job, result: None) as (on_progress, _):
        on_progress(0, LOADING, 0, 0)
        for done in range(4):
            on_progress(0, "low noise", done, 4)
    shown = capsys.readouterr().err
    assert "low noise, 40.00 s/step, 0:40 left" in shown and "3/4" in shown


@pytest.mark.usefixtures("clock")
def test_the_pace_of_a_clip_is_its_own_and_the_time_left_is_that_of_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    with progress.job_progress(["out.mp4"], lambda job, result: None) as (on_progress, _):
        for clip in (1, 2):
            for done in range(4):
                on_progress(0, f"clip {clip} of 3, low noise", done, 4)
    shown = capsys.readouterr().err
    assert "clip 2 of 3, low noise, 40.00 s/step, 3:20 left" in shown  # a step of this clip, four of the next


@pytest.mark.parametrize(("result", "end"), [({}, "done"), ({"error": "a fault"}, "failed")])
def test_the_bar_of_a_job_that_has_ended_says_so(
    result: dict[str, Any], end: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    told: list[tuple[int, dict[str, Any]]] = []
    with progress.job_progress(["out.mp4"], lambda *given: told.append(given)) as (on_progress, on_end):
        on_progress(0, "decoding", 4, 4)
        on_end(0, result)
        on_progress(0, "decoding", 4, 4)  # a report that was read late
    shown = capsys.readouterr().err
    assert f"{end} " in shown and "4/4" in shown and "decoding" not in shown
    assert told == [(0, result)]


@pytest.mark.usefixtures("clock")
def test_a_line_says_what_a_video_does_now(line: Callable[[], str]) -> None:
    with progress.job_progress(["out.mp4"], lambda job, result: None) as (on_progress, on_end):
        assert line() == ""
        said = [
            on_progress(0, *state) or line()
            for state in ((LOADING, 0, 0), ("encoding the image", 0, 3), *(("low noise", n, 3) for n in (1, 2)))
        ]
        assert said == [
            LOADING,
            "encoding the image, 0 of 3 steps",
            "low noise, 1 of 3 steps",
            "low noise, 2 of 3 steps, 40.00 s/step, 0:40 left",
        ]
        on_progress(0, "decoding", 3, 3)
        assert line() == "decoding, 3 of 3 steps, 40.00 s/step"
        on_end(0, {})
        assert line() == ""


def test_a_line_about_a_list_names_the_videos_that_are_made_now(line: Callable[[], str]) -> None:
    """Two rank groups make the list; the files of a video are completed while its group makes the next one."""
    with progress.job_progress(["a.mp4", "b.mp4", "c.mp4"], lambda job, result: None) as (on_progress, on_end):
        assert line() == ""  # as on a machine that is not the first
        on_progress(1, LOADING, 0, 0)
        on_progress(0, "high noise", 0, 4)
        assert line() == "0 of 3 done; a.mp4: high noise, 0 of 4 steps; b.mp4: loading the models"
        on_end(1, {"error": "a fault"})
        on_progress(2, "high noise", 0, 4)
        on_progress(0, "decoding", 4, 4)
        assert line() == "1 of 3 done; a.mp4: decoding, 4 of 4 steps; c.mp4: high noise, 0 of 4 steps"
        on_end(0, {})
        on_progress(0, "decoding", 4, 4)  # a report that was read late
        assert line() == "2 of 3 done; c.mp4: high noise, 0 of 4 steps"


def test_lines_come_at_intervals_and_end_with_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.2)
    texts = iter(("", "one", "two", "three", "four"))
    with progress._printed(lambda: next(texts)):
        assert capsys.readouterr().err == ""
        time.sleep(0.5)
        assert capsys.readouterr().err == "progress after 0:00: one\n"
        time.sleep(0.2)
    assert capsys.readouterr().err == "progress after 0:01: two\n"
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        tries = 0

        def write(self, text: str) -> int:
            self.tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    monkeypatch.setattr(sys, "stderr", full := Full())
    with progress._printed(lambda: "a line"):
        time.sleep(0.3)
    assert full.tries > 2


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_pipe_gets_lines_on_stderr_only(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    one = ("--prompt", "a cat", "--steps", "4", "--num-gpus", str(ranks), "--json")
    outcome = wanfast(*VIDEO, *one, "--output", "out.mp4")
    assert outcome.exit_code == 0, outcome.err
    assert list(outcome.document) and len(outcome.out.splitlines()) == 1
    lines = [text for text in outcome.err.splitlines() if text.startswith("progress after 0:0")]
    seen = ("loading the models", " of 4 steps", " s/step, 0:00 left", "decoding, 4 of 4 steps")
    for words in seen if ranks == 1 else seen[:1]:  # the parent looks at several ranks only twenty times a second
        assert any(words in text for text in lines), outcome.err


def test_a_list_in_a_pipe_tells_the_videos_apart(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    Path("jobs.jsonl").write_text(
        "".join(json.dumps({"prompt": name, "output": f"{name}.mp4"}) + "\n" for name in "ab")
    )
    groups = ("--num-gpus", "2", "--cfg-parallel", "1", "--ulysses", "1")
    outcome = wanfast(*VIDEO, "--steps", "4", *groups, "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 2 and "progress" not in outcome.out
    for words in (": 0 of 2 done; ", "; a.mp4: loading the models", "; b.mp4: loading the models"):
        assert words in outcome.err


def test_a_video_that_ends_soon_prints_no_line(wanfast: Wanfast) -> None:
    outcome = wanfast(*VIDEO, "--prompt", "a cat", "--steps", "1", "--output", "out.mp4")
    assert outcome.exit_code == 0 and "progress" not in outcome.err


@pytest.mark.usefixtures("clock")
def test_bytes_are_told_in_lines_too(line: Callable[[], str]) -> None:
    with progress.byte_progress() as on_bytes:
        assert line() == ""
        on_bytes("high_noise", 1_500_000_000, 57_000_000_000)
        assert line() == "high noise, 1.5 GB of 57.0 GB"
