"""Tests the speed and quality of skipping on the tiny model, as `make tiny-magcache` measures them."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanfast.quality import skipping, tiny


@pytest.mark.slow
def test_a_pair_by_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "SETTINGS", skipping.SETTINGS[5:6])
    judge = tiny.Judge(tiny.Settings("tiny", steps=40, guidance=2.0, precision="bf16"))
    results = [skipping.judged(judge, 1)]
    off, greedy, best, extrapolated = skipping.summarise(results, judge)
    assert (off["skipped_forwards"], off["psnr_unskipped"], off["ssim_unskipped"]) == (0, None, 1.0)
    assert [row["plan"] for row in (greedy, best, extrapolated)] == ["greedy", "least error", "extrapolated"]
    assert greedy["skipped_forwards"] == best["skipped_forwards"] == extrapolated["skipped_forwards"] > 30
    assert best["accumulated_error"] < greedy["accumulated_error"]
    assert extrapolated["psnr_unskipped"] > best["psnr_unskipped"] + 3
    for row in (greedy, best, extrapolated):
        assert 20 < row["psnr_unskipped"] < 90 and 0.8 < row["ssim_unskipped"] <= 1
    assert all(row["prompt_following"]["of"] == 1 for row in (off, greedy, best, extrapolated))
    assert off["prompt_following"]["right"] == 1
    skipping.plot([off, greedy, best, extrapolated], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_eight_and_ways_of_equal_cost() -> None:
    assert len(set(skipping.SETTINGS)) >= 8
    assert {rule for rule, _ in skipping.SETTINGS} == {"low-noise-only", "both-experts"}
