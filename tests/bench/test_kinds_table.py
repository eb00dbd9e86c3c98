"""Tests that a result fills the table of last images and joined clips in docs/kinds.md."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.results import ROOT, program

kinds_table = program("kinds_table")


def share(right: int, of: int) -> dict[str, int]:
    return {"right": right, "of": of}


def between(psnr: float) -> dict[str, Any]:
    reached = {"last_frame_psnr": psnr, "last_frame_psnr_least": psnr - 2, "last_frame_reached": share(9, 10)}
    return {"given": reached, "not_given": {"last_frame_reached": share(1, 10)}}


def chains(seams: float) -> dict[str, Any]:
    drift = [{"mean": [-1.5, 0.0, clip], "deviation": [0.25, 0.5, -clip]} for clip in range(3)]
    return {
        "difference": {"seams": seams, "inside_95%": 4.5},
        "smooth_videos": share(17, 18),
        "seams_by_motion": {
            "circle": {"smooth_videos": [12, 12]},
            "still": {"smooth_videos": [5, 6], "seams": seams / 2, "inside_95%": 0.25, "round_trip": 0.375},
        },
        "motion_goes_on": share(40, 45),
        "prompt_following": [share(18, 18), share(17, 18), share(16, 18), share(15, 18)],
        "drift": drift,
    }


def measured_kinds() -> dict[str, Any]:
    """Returns a result of `make tiny-kinds`."""
    return {
        "between": {"shape": between(34.04), "camera": between(27.3)},
        "clips": 4,
        "chains": {"shape": chains(1.25), "camera": chains(3.75)},
        "hardware": {"device": "a CPU"},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789ab-dirty",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a folder with the page and a result."""
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / kinds_table.PAGE, tmp_path / "docs")
    (tmp_path / kinds_table.OWN).write_text(json.dumps(measured_kinds()))
    return tmp_path


def test_a_result_fills_the_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kinds_table", "--root", str(root)])
    kinds_table.main()
    page = (root / kinds_table.PAGE).read_text()
    for line in (
        "| on held-out pairs[^kinds] | shapes | photographs |",
        "mean and least | 34.0 dB, 32.0 dB | 27.3 dB, 25.3 dB |",
        "| videos that reach it (25 dB or more) | 9 of 10 | 9 of 10 |",
        "| the same without the last image | 1 of 10 | 1 of 10 |",
        "at the seams, of 255 | 1.250 | 3.750 |",
        "| the 95th percentile of the same inside the clips | 4.500 | 4.500 |",
        "| videos whose seams are below their own 95th percentile | 17 of 18 | 17 of 18 |",
        "| the same by motion | circle 12 of 12, still 5 of 6 | circle 12 of 12, still 5 of 6 |",
        "percentile inside the clips | 0.625, 0.250 | 1.875, 0.250 |",
        "encoded and decoded by the VAE | 0.375 | 0.375 |",
        "| seams over which the motion goes on | 40 of 45 | 40 of 45 |",
        "| 18 of 18, 15 of 18 | 18 of 18, 15 of 18 |",
        "in clip 4, of 255 | -1.50, +0.00, +2.00 | -1.50, +0.00, +2.00 |",
        "[^kinds]: `make tiny-kinds`: a CPU, torch 2.13.0; `benchmarks/results/tiny-kinds.json` (0123456789ab-dirty).",
        "34.0 dB = between/shape/given/last_frame_psnr; 32.0 dB = between/shape/given/last_frame_psnr_least",
        "3.750 = chains/camera/difference/seams",
    ):
        assert line in page, line
    assert "Not measured yet" not in page


def test_without_photographs_the_table_has_one_column(root: Path) -> None:
    document = json.loads((root / kinds_table.OWN).read_text())
    for kind in ("between", "chains"):
        del document[kind]["camera"]
    document["chains"]["shape"]["motion_goes_on"] = None  # no shape could be followed
    del document["chains"]["shape"]["seams_by_motion"]["still"]
    (root / kinds_table.OWN).write_text(json.dumps(document))
    first, *rest = kinds_table.lines(root)
    assert first == "| on held-out pairs[^kinds] | shapes |" and "| seams over which the motion goes on | — |" in rest
    assert "| still videos: the mean at the seams, and the 95th percentile inside the clips | — |" in rest
