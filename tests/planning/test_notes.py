"""Tests the notes of a plan."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest

from tests.conftest import Machine, Outcome
from tests.media.test_earlier_video import write
from wanfast.runtime.machine import host

Wanfast = Callable[..., Outcome]
DRY = ("generate", "--image", "cat.png", "--fit", "crop", "--prompt", "a cat", "--dry-run", "--json")
TINY = ("--model", "tiny", "--device", "cpu")
LARGE = ("--size", "1280*720")
LONG = (
    "of denoising, at 100 GFLOP/s a core: it has 56.2 times the tokens of the model's own size; use --size 128x128 and "
)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (TINY, None),
        ((*TINY, "--size", "256x256", "--frames", "33"), None),
        ((*TINY, *LARGE, "--steps", "1"), None),
        ((*TINY, *LARGE), f"this video takes a CPU about 24 minutes {LONG}--frames 17, or a GPU"),
        ((*TINY, *LARGE, "--prompt", "a dog"), "about 48 minutes"),  # a second clip
        ((*TINY, *LARGE, "--prompt", "a dog", "--steps", "120"), "about 2 hours"),
        (
            (*TINY, *LARGE, "--prompt", "a dog", "--num-gpus", "2"),
            "about 3 minutes",
        ),  # a rank alone has one thread, each of two has eight
        ((*TINY, "--steps", "1000", "--prompt", "a dog", "--guidance-high-noise", "1"), None),
        (("--device", "cpu"), "this video takes a CPU about 4 days of denoising, at 100 GFLOP/s a core: use a GPU"),
        (("--device", "cpu", "--frames", "161"), "about 12 days of denoising, at 100 GFLOP/s a core: use a GPU"),
        (("--device", "cpu", "--size", "832x480"), "about 23 hours of denoising, at 100 GFLOP/s a core: use a GPU"),
        (("--device", "cuda"), None),
    ],
)
def test_a_video_that_takes_a_cpu_long_is_noted(
    wanfast: Wanfast,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    note: str | None,
) -> None:
    machine(0, 0)
    monkeypatch.setattr(host, "cores", lambda: 16)
    outcome = wanfast(*DRY, *options)
    assert outcome.exit_code == 0, outcome.err
    assert outcome.err.count(" of denoising, at ") == (note is not None) and (note or "") in outcome.err
    assert any(" of denoising, at " in each for each in outcome.document["plan"]["notes"]) == (note is not None)


@pytest.mark.parametrize(("fps", "speed"), [(30, "1.9"), (16, None), (12, "0.75")])
def test_an_earlier_video_of_another_rate_is_noted(wanfast: Wanfast, fps: int, speed: str | None) -> None:
    write(Path("old.mp4"), 64, 48, num_frames=30, fps=fps)
    outcome = wanfast("generate", "--continue-from", "old.mp4", "--prompt", "a cat", "--dry-run", "--json", *TINY)
    assert outcome.exit_code == 0, outcome.err
    found = [note for note in outcome.document["plan"]["notes"] if "times as fast" in note]
    expected = (
        f"--continue-from: the earlier video has {fps} frames per second, but the model's motion is for 16, so that a "
        f"new clip plays {speed} times as fast: to avoid this, convert the file first, for example with "
        "`ffmpeg -i OLD.mp4 -r 16 NEW.mp4`"
    )
    assert found == ([expected] if speed else [])
    convert = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "old.mp4", "-r", "16", "new.mp4"]
    subprocess.run(convert, check=True)
    again = wanfast("generate", "--continue-from", "new.mp4", "--prompt", "a cat", "--dry-run", *TINY)
    assert again.exit_code == 0 and "times as fast" not in again.err


def test_a_rate_that_is_asked_for_is_not_noted(wanfast: Wanfast) -> None:
    assert "times as fast" not in wanfast(*DRY, *TINY, "--prompt", "a dog", "--fps", "30").err


def test_the_note_of_a_list_names_its_lines(wanfast: Wanfast) -> None:
    lines = ({"size": "1280x720"}, {}, {"size": "1280x720"})
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    err = wanfast(*DRY, *TINY, "--jobs", "jobs.jsonl").err
    assert "note (lines 1 and 3): this video takes a CPU about 24 minutes" in err
