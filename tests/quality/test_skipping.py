"""Tests the speed and quality of skipping on the tiny model, as `make tiny-magcache` measures them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quality.test_few_steps import with_pair
from wanfast.quality import skipping, tiny
from wanfast.runtime.planning.plan import Plan


@pytest.mark.slow
def test_a_pair_by_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "SETTINGS", skipping.SETTINGS[5:6])
    judge = tiny.Judge(tiny.Settings("tiny", steps=40, guidance=2.0, precision="bf16", side=96, frames=9))
    results = [skipping.judged(judge, (1, False))]
    off, greedy, best, extrapolated = skipping.summarise(results, judge, with_others=False)
    assert (off["skipped_forwards"], off["psnr_unskipped"], off["ssim_unskipped"]) == (0, None, 1.0)
    assert [row["plan"] for row in (greedy, best, extrapolated)] == ["greedy", "least error", "extrapolated"]
    assert greedy["skipped_forwards"] == best["skipped_forwards"] == extrapolated["skipped_forwards"] > 30
    assert best["accumulated_error"] < greedy["accumulated_error"]
    assert extrapolated["psnr_unskipped"] > best["psnr_unskipped"] + 3
    for row in (greedy, best, extrapolated):
        assert 20 < row["psnr_unskipped"] < 90 and 0.8 < row["ssim_unskipped"] <= 1
    assert all(row["prompt_following"]["of"] == 1 for row in (off, greedy, best, extrapolated))
    assert off["prompt_following"]["right"] == 1
    skipping.plot([off, greedy, best, extrapolated], [], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_eight_and_ways_of_equal_cost() -> None:
    assert len(set(skipping.SETTINGS)) >= 8
    assert {rule for rule, _ in skipping.SETTINGS} == {"low-noise-only", "both-experts"}


def small_judge(model: str) -> tiny.Judge:
    return tiny.Judge(tiny.Settings(model, steps=40, guidance=2.0, precision="bf16", side=64, frames=5))


def test_gates_and_the_hybrid_are_measured_with_both_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "SETTINGS", ())
    judge, loaded = small_judge(str(with_pair(tmp_path, 0.2))), []
    pipeline_of = judge.pipeline_of
    monkeypatch.setattr(judge, "pipeline_of", lambda config: loaded.append(config.models) or pipeline_of(config))
    off, *rows = skipping.summarise([skipping.judged(judge, (1, True))], judge, with_others=True)
    cached = "E012K2R20, both-experts"
    assert [(row["settings"], row["plan"]) for row in rows] == [
        ("gate 0.3", "no skips"),
        ("gate 0.5", "no skips"),
        (f"gate 0.5, {cached}", "least error"),
        (f"gate 0.5, {cached}", "extrapolated"),
        ("gate 0.7", "no skips"),
        ("hybrid", "no skips"),
        (f"hybrid, {cached}", "least error"),
        (f"hybrid, {cached}", "extrapolated"),
    ]
    assert [row["skipped_forwards"] for row in rows if row["plan"] == "no skips"] == [28, 20, 12, 47]
    gate, last, line, _, hybrid, skipped, _ = rows[1:]
    assert off["skipped_share"] == 0 and gate["skipped_share"] == 0.25
    assert last["skipped_forwards"] == line["skipped_forwards"] > gate["skipped_forwards"] + 15
    assert skipped["skipped_forwards"] > hybrid["skipped_forwards"] + 10
    assert len({row["psnr_unskipped"] for row in rows}) == len(rows)  # no two videos are the same
    assert rows[0]["psnr_unskipped"] < rows[4]["psnr_unskipped"]  # gates 0.3 and 0.7
    assert [bool(models.lora_low_noise) for models in loaded] == [False] * 5 + [True] * 3  # only the hybrid's
    assert not any(models.lora_high_noise for models in loaded)
    skipping.plot([off], rows, tmp_path / "plot.png")


def test_the_hybrid_waits_for_a_pair(tmp_path: Path) -> None:
    own = with_pair(tmp_path, 0.2)
    (own / "loras/lightning-4/low_noise.safetensors").unlink()
    judge = small_judge(str(own))
    full = Plan.of(judge.config, judge.files.spec, (64, 64))
    assert {way.settings.split(",")[0] for way in skipping.other_ways(full, judge)} == {
        f"gate {gate:g}" for gate in skipping.GATES
    }
