"""Tests schedules of one expert alone, and measurements that are no numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome
from tests.on_ranks import on_ranks
from wanfast.magcache_calib.recorder import Recorder
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, NotFiniteError
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.sampling.magcache import resample
from wanfast.runtime.store.artifacts import MANIFEST

Wanfast = Callable[..., Outcome]
SHAPE = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "4")
CALIBRATE = ("calibrate-magcache", *SHAPE, "--set", "set", "--json")
GENERATE = ("generate", *SHAPE, "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--json", "--overwrite")
SKIP = ("--magcache", "artifact", "--magcache-thresh", "9", "--retention-ratio", "0", "--magcache-rule", "both-experts")


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Writes a set of one clip."""
    (workdir / "set").mkdir()
    shutil.copy("cat.png", "set/a.png")
    (workdir / "set/clips.jsonl").write_text('{"image": "a.png", "prompt": "a cat jumps"}')
    return workdir / "set"


@pytest.mark.parametrize(("shift", "missing"), [("0.005", "high-noise"), ("1000", "low-noise")])
def test_a_curve_of_one_expert(wanfast: Wanfast, folder: Path, shift: str, missing: str) -> None:
    """It serves its own schedule, and a schedule of both experts refuses it in one line."""
    outcome = wanfast(*CALIBRATE, "--shift", shift)
    assert outcome.exit_code == 0, outcome.err
    assert len(set(outcome.document["experts"])) == 1
    made = wanfast(*GENERATE, "--shift", shift, *SKIP)
    assert made.exit_code == 0, made.err
    assert made.document["plan"]["magcache"]["skipped_forwards"] > 0
    refused = wanfast(*GENERATE, "--shift", "5", *SKIP, "--magcache-interpolate")
    assert refused.exit_code == 2, refused.err
    assert f"the curve has too few steps of the {missing} expert for an interpolation: 0, but at least 2" in refused.err
    assert "wanfast calibrate-magcache" in refused.err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--steps", "1"), "low-noise-only"),
        (("--shift", "0.001"), "low-noise-only"),
        (("--shift", "0.001"), "both-experts"),
        (("--shift", "1000"), "low-noise-only"),
        (("--steps", "2"), "both-experts"),
    ],
)
def test_a_schedule_of_one_expert_makes_a_video(
    wanfast: Wanfast, workdir: Path, options: tuple[str, str], rule: str
) -> None:
    outcome = wanfast(*GENERATE, *options, "--magcache", "preset", "--magcache-interpolate", "--magcache-rule", rule)
    assert outcome.exit_code == 0, outcome.err


def test_a_curve_that_would_have_to_be_extrapolated_far_is_refused() -> None:
    steep = [(1.0, 1.0), (1e6, 1e6)]
    with pytest.raises(ConfigError, match="too far"):
        resample(steep, [("low_noise", 899), ("low_noise", 898)], [("low_noise", 800), ("low_noise", 0)])


NO_RATIOS: list[object] = [
    [[1.0, 0.0]] * 4, [[1.0, float("nan")]] * 4, [[1.0, -1]] * 4, [[1.0]] * 4, [[1.0, 1.0]] * 3, {}, [["1", 1]] * 4,
]  # fmt: skip


def test_a_curve_of_no_ratios_is_refused(wanfast: Wanfast, folder: Path) -> None:
    artifact = Path(wanfast(*CALIBRATE).document["output"])
    known = json.loads((artifact / "ratios.json").read_text())
    for ratios in NO_RATIOS:
        text = json.dumps(known | {"ratios": ratios})
        (artifact / "ratios.json").write_text(text)
        manifest = json.loads((artifact / MANIFEST).read_text())
        manifest["files"]["ratios.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        (artifact / MANIFEST).write_text(json.dumps(manifest))
        outcome = wanfast(*GENERATE, "--magcache", "artifact", "--dry-run")
        assert outcome.exit_code == 4, (ratios, outcome.err)
        assert "the curve does not hold two positive numbers for each of 4 steps" in outcome.err, ratios


def test_a_ratio_that_is_not_finite_is_an_error_on_all_ranks() -> None:
    """A residual of zero has no ratio to it."""

    def work(ranks: Ranks) -> tuple[str, bool]:
        recorder = Recorder(ranks, 4)
        for step, residual in enumerate([torch.zeros(1, 2, 3), torch.ones(1, 2, 3)]):
            recorder.keep(step, "prompt", residual + ranks.rank)
        with pytest.raises(NotFiniteError) as error:
            recorder.measured(2)
        return str(error.value).partition(" holds")[0], error.value.is_agreed

    assert on_ranks(Mesh(ulysses=2), work) == [("the ratio of residuals at step 2 of 2, branch prompt,", True)] * 2


def test_a_calibration_with_nan_stores_nothing(wanfast: Wanfast, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = WanDiT.forward

    def spoil(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        velocity, residual = forward(*arguments, **options)
        return velocity, residual.fill_(torch.nan)

    monkeypatch.setattr(WanDiT, "forward", spoil)
    outcome = wanfast(*CALIBRATE)
    assert outcome.exit_code == 7 and "ratio of residuals at step 2 of 4" in outcome.err
    assert not list(Path("artifacts").glob("magcache*/*"))


def test_a_measurement_that_is_not_finite_is_made_again(wanfast: Wanfast, folder: Path) -> None:
    first = wanfast(*CALIBRATE).document
    shutil.rmtree(first["output"])
    (kept,) = Path("artifacts/magcache_clips").iterdir()
    document = json.loads(kept.read_text())
    document["measured"]["steps"][1]["prompt"]["ratio"] = float("nan")
    kept.write_text(json.dumps(document))
    assert wanfast(*CALIBRATE).document["ratios"] == first["ratios"]
