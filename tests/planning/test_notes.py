"""Tests the notes of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Machine, Outcome
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


def test_the_note_of_a_list_names_its_lines(wanfast: Wanfast) -> None:
    lines = ({"size": "1280x720"}, {}, {"size": "1280x720"})
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    err = wanfast(*DRY, *TINY, "--jobs", "jobs.jsonl").err
    assert "note (lines 1 and 3): this video takes a CPU about 24 minutes" in err
