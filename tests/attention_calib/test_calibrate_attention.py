"""Tests `wanfast calibrate-attention`, and the runs that use the stored plan."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.configs import effective_config
from tests.conftest import Machine, Outcome
from wanfast.attention_calib import calibrate
from wanfast.runtime.config import of_command
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.session import Session
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.densities import LADDER
from wanfast.runtime.jobs.loop import measuring
from wanfast.runtime.machine import packages
from wanfast.runtime.planning.job import Job
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import MANIFEST, ArtifactStore
from wanfast.runtime.store.attention_plans import KIND, settle

Wanfast = Callable[..., Outcome]
# 320 tokens are three blocks, of which two are always listed; the lists of the last density have all three.
SHAPE = ("--model", "tiny", "--device", "cpu", "--size", "128x128", "--frames", "17", "--steps", "3")
CALIBRATE = ("calibrate-attention", *SHAPE, "--set", "set", "--json")
GENERATE = ("generate", *SHAPE, "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--json")
SPARSE = (*GENERATE, "--attention", "sparse")
PLANNED = (*SPARSE, "--attention-plan", "artifact")


def measure_by(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    monkeypatch.setattr(calibrate, "measure", measure)
    monkeypatch.setattr(calibrate, "run", measuring(measure))


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Writes a set of two clips."""
    (workdir / "set").mkdir()
    shutil.copy("cat.png", "set/a.png")
    lines = [{"image": "a.png", "prompt": "a cat jumps"}, {"image": "a.png", "prompt": "a cat sleeps"}]
    (workdir / "set/clips.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return workdir / "set"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the measurement of a clip, which takes a second: the first clip has twice the errors of the second."""
    heads = [[0.4, 0.3, 0.2, 0.1, 0.05, 0.01], [0.9, 0.8, 0.7, 0.6, 0.5, 0.02]]

    def measure(index: int, job: Job, *arguments: Any) -> dict[str, Any]:
        scale = 1.0 if "jumps" in job.config.video.prompt else 0.5
        return {"errors": [[[[scale * error for error in head] for head in heads]] * 5] * 3, "seconds": 1.0}

    measure_by(monkeypatch, measure)


def test_a_plan_is_calibrated_stored_and_used(wanfast: Wanfast, folder: Path) -> None:
    outcome = wanfast(*CALIBRATE)
    assert outcome.exit_code == 0, outcome.err
    found = outcome.document
    artifact = Path(found["output"])
    assert sorted(file.name for file in artifact.iterdir()) == ["manifest.json", "plan.json"]
    assert found["bands"] == [0, 1, 2] and found["clips"] == 2
    errors, densities = found["errors"], found["densities"]
    assert [len(errors), len(errors[0]), len(errors[0][0]), len(errors[0][0][0])] == [3, 5, 2, 5]
    heads = [head for layers in errors for layer in layers for head in layer]
    assert all(head[0] == head[3] > head[4] and head[4] < 1e-5 for head in heads)  # two blocks, or all three
    assert {density for layers in densities for layer in layers for density in layer} == {LADDER[0], LADDER[4]}
    for layers, of_errors in zip(densities, errors, strict=True):
        for layer, of_layer in zip(layers, of_errors, strict=True):
            assert [density == LADDER[0] for density in layer] == [head[0] <= 0.1 for head in of_layer]
    assert f"--attention-plan {artifact.name}` uses this plan" in outcome.err

    again = wanfast(*CALIBRATE)
    assert again.document["was_there"] and again.document["densities"] == densities

    made = wanfast(*PLANNED, "--attention-check", "--dense-share", "0", "--dense-layers", "0")
    assert made.exit_code == 0, made.err
    sparsity = made.document["plan"]["sparsity"]
    assert sparsity["plan"]["key"] == made.document["effective"]["models"]["attention_plan"] == artifact.name
    blocks = [2 if density == LADDER[0] else 3 for layers in densities for layer in layers for density in layer]
    assert sparsity["mean_density"] == pytest.approx(sum(blocks) / len(blocks) / 3, abs=1e-4)
    check = made.document["attention_check"]
    assert check["mean"] == pytest.approx(found["mean_error"], rel=0.5)  # another clip
    repeated = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert repeated.document["output_sha256"] == made.document["output_sha256"]
    other = wanfast("generate", "--from", "out.json", "--density", "1", "--output", "b.mp4", "--json", "--dry-run")
    assert other.document["effective"]["models"]["attention_plan"] is None
    assert other.document["plan"]["sparsity"]["density"] == 1 and "plan" not in other.document["plan"]["sparsity"]


def test_heads_may_be_in_float8(wanfast: Wanfast, folder: Path) -> None:
    (folder / "clips.jsonl").write_text((folder / "clips.jsonl").read_text().splitlines()[0])
    outcome = wanfast(*CALIBRATE, "--fp8")
    assert outcome.exit_code == 0, outcome.err
    found, key = outcome.document, outcome.document["key"]
    heads = [density for layers in found["densities"] for layer in layers for density in layer]
    in_fp8 = heads.count("fp8")
    assert in_fp8 and {*heads} == {LADDER[0], "fp8"}
    assert [rung["density"] for rung in found["ladder"]] == [0.15, 0.25, 0.35, 0.5, "fp8", 0.75]
    assert f"0 of 30 heads dense, {in_fp8} in float8" in outcome.err and "0.5: 0." in outcome.err

    made = wanfast(*PLANNED, "--attention-check", "--dense-share", "0", "--dense-layers", "0")
    assert made.exit_code == 0, made.err
    assert made.document["plan"]["sparsity"]["plan"]["key"] == key
    of_heads = [2 if density == LADDER[0] else 0.75 * 3 for density in heads]
    assert made.document["plan"]["sparsity"]["mean_density"] == pytest.approx(sum(of_heads) / 90, abs=1e-4)
    assert made.document["attention_check"]["mean"] == pytest.approx(found["mean_error"], rel=0.5)  # another clip
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.document["output_sha256"] == made.document["output_sha256"]
    shown = wanfast(*(word for word in PLANNED if word != "--json"), "--dry-run", "--dense-layers", "0")
    of_last = sum(layer.count("fp8") for layer in found["densities"][2])
    assert of_last and f", {of_last} heads in float8; by layer" in " ".join(shown.out.split())

    other = wanfast(*CALIBRATE)
    assert "1 of 1 clips were measured in an earlier run" in other.err and other.document["key"] != key
    assert {density for layers in other.document["densities"] for layer in layers for density in layer} == {0.15, 0.75}
    assert f"{key} (target 0.1, with float8)" in wanfast(*PLANNED, "--dry-run").err


def test_float8_needs_its_package_on_a_gpu(
    wanfast: Wanfast, folder: Path, measured: None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = wanfast(*CALIBRATE, "--fp8").document["key"]
    machine(1, 84)
    words = (
        "heads in float8 need fa3-fwd, which is not installed: run `pip install 'wanfast[fa3]'`, or use a plan without"
    )
    installed = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: name == "flash_attn" or installed(name))
    run = wanfast(*PLANNED, "--device", "cuda")
    assert run.exit_code == 2 and f"--attention-plan {key}: {words}" in run.err
    assert f"note: --attention-plan {key}: {words}" in wanfast(*PLANNED, "--device", "cuda", "--dry-run").err
    calibration = wanfast(*CALIBRATE, "--fp8", "--device", "cuda")
    assert calibration.exit_code == 2 and f"--fp8: {words}" in calibration.err


def test_float8_is_refused_before_a_clip_is_denoised(
    wanfast: Wanfast, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_probe, "runs_fp8", lambda *asked: False)
    monkeypatch.setattr(Session, "latent", lambda *arguments: Path("denoised").touch())
    outcome = wanfast(*CALIBRATE, "--fp8")
    assert outcome.exit_code == 2 and "--fp8: heads in float8 need the kernel fa3-fp8" in outcome.err
    assert not Path("denoised").exists()


def test_a_plan_is_made_of_all_clips_or_not_at_all(
    wanfast: Wanfast, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second clip's errors lack those in float8, as another calibration on another machine leaves them."""

    def measure(index: int, job: Job, *arguments: Any) -> dict[str, Any]:
        lengths = 6 if "jumps" in job.config.video.prompt else 5
        return {"errors": [[[[0.01] * lengths] * 2] * 5] * 3, "seconds": 1.0}

    measure_by(monkeypatch, measure)
    outcome = wanfast(*CALIBRATE, "--fp8")
    assert outcome.exit_code == 3 and "a clip was measured, but its file is missing or incomplete now" in outcome.err
    assert not list(Path("artifacts", KIND).glob("*/manifest.json"))
    assert wanfast(*CALIBRATE).document["clips"] == 2


def test_a_run_that_was_cut_off_goes_on(
    wanfast: Wanfast, folder: Path, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wanfast(*CALIBRATE, "--artifacts-dir", "other").document["densities"]
    made, measure = Path("made"), calibrate.measure

    def noted(index: int, *arguments: Any) -> dict[str, Any]:
        if not Path("whole").exists() and made.exists():
            os._exit(1)
        with made.open("a") as stream:
            stream.write(f"{index} ")
        return measure(index, *arguments)

    measure_by(monkeypatch, noted)
    assert wanfast(*CALIBRATE).exit_code == 5
    assert not list(Path("artifacts", KIND).glob("*/manifest.json"))
    Path("whole").touch()
    outcome = wanfast(*CALIBRATE)
    assert "1 of 2 clips were measured in an earlier run" in outcome.err
    assert made.read_text() == "0 0 "  # one clip in each run
    assert outcome.document["densities"] == whole


def test_another_target_needs_no_other_measurement(
    wanfast: Wanfast, folder: Path, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = wanfast(*CALIBRATE)
    assert first.exit_code == 0, first.err
    assert first.document["densities"][0][0] == [LADDER[3], None]
    assert "mean density 0.75, 15 of 30 heads dense" in first.err
    assert "error mean if all heads had one density: 0.15: 0.487, 0.25: 0.412" in first.err
    measure_by(monkeypatch, None)
    second = wanfast(*CALIBRATE, "--target-error", "0.5")
    assert second.exit_code == 0, second.err
    assert "2 of 2 clips were measured in an earlier run" in second.err
    assert second.document["densities"][0][0] == [LADDER[0], LADDER[4]]
    keys = [outcome.document["key"] for outcome in (first, second)]
    several = wanfast(*PLANNED, "--dry-run")
    assert several.exit_code == 2 and all(f"{key} (target 0." in several.err for key in keys)
    named = wanfast(*SPARSE, "--attention-plan", keys[1], "--dry-run")
    assert named.document["plan"]["sparsity"]["plan"]["target_error"] == 0.5


def test_a_dry_run_shows_densities_by_layer_and_band_and_the_error(
    wanfast: Wanfast, folder: Path, measured: None
) -> None:
    key = wanfast(*CALIBRATE).document["key"]
    shown = wanfast(*(word for word in PLANNED if word != "--json"), "--dry-run")
    text = " ".join(shown.out.split())
    assert "at most 3 of 3 blocks of 128 tokens: density 0.83; dense in the first 1 of 3 steps" in text
    assert f"plan {key}: error mean 0.037, largest 0.1, measured for the target 0.1" in text
    assert "steps 2 to 2: mean density 0.87; by layer 1.00 0.83 0.83 0.83 0.83" in text
    assert "mean density of the video 0.91; lists" in text  # a step of three and a layer of five are dense
    two_ranks = (*PLANNED, "--dry-run", "--num-gpus", "2", "--cfg-parallel", "1")
    sparsity = wanfast(*two_ranks).document["plan"]["sparsity"]
    assert (sparsity["mean_density"], sparsity["slowest_rank_density"]) == (0.9111, 1.0)  # each rank has one head
    shown = wanfast(*(word for word in two_ranks if word != "--json"))
    assert "mean density of the video 0.91, on the slowest rank 1.00; lists" in " ".join(shown.out.split())


def test_a_plan_is_refused_or_taken(wanfast: Wanfast, folder: Path, measured: None) -> None:
    """What stands in the key must be equal; guards, seeds, the gate of guidance and the mesh are free."""
    key = wanfast(*CALIBRATE).document["key"]
    calibrate = "run `wanfast calibrate-attention --model"
    cases: list[tuple[str, int, str]] = [
        ("--steps 4", 3, f"(the plan {key} has steps 3, this run has 4): {calibrate}"),
        ("--lists-every 2", 3, f"{key} has lists_every 4, this run has 2"),
        ("--precision fp32", 3, f"{key} has precision bf16, this run has fp32"),
        ("--attention-plan 0123456789ab", 3, f"no plan has this key: use one of {key}"),
        ("--attention-plan mine", 2, "--attention-plan mine: use artifact, or the key of a stored plan"),
        ("--density 0.5", 2, "--density and --attention-plan exclude each other: drop one of the two"),
        ("--attention math", 2, "--attention-plan needs --attention sparse: use --attention sparse, or drop"),
        ("--dense-share 0.9", 2, "all 3 steps would use dense attention"),
        ("--guidance-gate 0.5 --num-gpus 2 --cfg-parallel 1", 0, ""),
        ("--seed 5 --dense-layers 2", 0, ""),
    ]
    for options, code, words in cases:
        outcome = wanfast(*PLANNED, "--dry-run", *options.split())
        assert outcome.exit_code == code and words in outcome.err, (options, outcome.err)
        assert code == 0 or len(outcome.err.splitlines()) == 1


def test_without_a_plan_the_calibration_is_named(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*PLANNED, "--dry-run")
    assert outcome.exit_code == 3
    assert (
        "--attention-plan artifact: no plan is calibrated for this run: run `wanfast calibrate-attention" in outcome.err
    )


def test_the_command_of_a_refusal_fixes_it(wanfast: Wanfast, folder: Path, measured: None) -> None:
    asked = (*PLANNED, "--dry-run", "--lists-every", "2", "--guidance-low-noise", "3")
    refused = wanfast(*asked)
    command = refused.err.split("`")[1].split()
    assert command[:2] == ["wanfast", "calibrate-attention"] and "--attention" not in command
    assert wanfast(*command[1:], "--set", "set").exit_code == 0
    found = wanfast(*asked)
    assert found.exit_code == 0, found.err
    assert found.document["plan"]["sparsity"]["lists_every"] == 2


def test_noise_levels_of_a_list_have_no_plan(wanfast: Wanfast, folder: Path) -> None:
    without_steps = [word for word in PLANNED if word not in ("--steps", "3")]
    outcome = wanfast(*without_steps, "--sigmas", "1,0.9,0.5", "--dry-run")
    assert outcome.exit_code == 2 and "--attention-plan and --sigmas exclude each other" in outcome.err
    own = {"recipe": "lightning-4", "attention": "sparse", "attention_plan": "artifact"}
    with pytest.raises(ConfigError, match=r"--attention-plan and --recipe lightning-4 exclude .*, or drop --recipe"):
        settle(effective_config(**own), model_files.locate("tiny", "artifacts"))
    with pytest.raises(ConfigError, match="--recipe lightning-4: a plan of attention is calibrated with --steps"):
        of_command({"recipe": "lightning-4"}, "calibrate-attention")


@pytest.mark.parametrize("target", ["0", "1", "-0.1"])
def test_a_target_is_a_share(wanfast: Wanfast, folder: Path, target: str) -> None:
    outcome = wanfast(*CALIBRATE, "--target-error", target)
    assert outcome.exit_code == 2 and "use a number over 0 and under 1, such as 0.1" in outcome.err


def test_an_edited_plan_is_refused(wanfast: Wanfast, folder: Path, measured: None) -> None:
    document = wanfast(*CALIBRATE).document
    artifact = Path(document["output"])
    plan, manifest = artifact / "plan.json", artifact / MANIFEST
    whole, of_whole = plan.read_text(), manifest.read_text()
    plan.write_text(whole.replace("0.5", "0.6"))
    outcome = wanfast(*PLANNED, "--dry-run")
    assert outcome.exit_code == 4 and f"{artifact} was changed after it was made" in outcome.err
    plan.write_text(whole)
    manifest.write_text(of_whole.replace('"lists_every": 4', '"lists_every": 2'))
    outcome = wanfast(*PLANNED, "--dry-run", "--lists-every", "2")
    assert outcome.exit_code == 4 and f"{artifact} was changed after it was made" in outcome.err
    shutil.rmtree(artifact)
    for changed in ({"bands": [0, 1, 1]}, {"bands": ["a", 1, 2]}, {"bands": [0, 1]}):
        text = json.dumps({**json.loads(whole), **changed})
        ArtifactStore(Path("artifacts")).publish(
            KIND, document["inputs"], lambda partial, text=text: (partial / "plan.json").write_text(text)
        )
        assert wanfast(*PLANNED, "--dry-run").exit_code == 4
        shutil.rmtree(artifact)
    for densities in ([], [[[0.5, 0.33]] * 5] * 3, [[[0.5]] * 5] * 3, [[[0.5, None]] * 4] * 3, 3):
        text = json.dumps({**json.loads(whole), "densities": densities})
        ArtifactStore(Path("artifacts")).publish(
            KIND, document["inputs"], lambda partial, text=text: (partial / "plan.json").write_text(text)
        )
        outcome = wanfast(*PLANNED, "--dry-run")
        assert outcome.exit_code == 4 and "does not hold a density for each band, layer and head" in outcome.err
        shutil.rmtree(artifact)


def test_each_line_of_a_list_may_have_a_plan_or_a_density(wanfast: Wanfast, folder: Path, measured: None) -> None:
    key = wanfast(*CALIBRATE).document["key"]
    Path("list.jsonl").write_text('{"density": 0.5}\n{"attention_plan": "artifact"}\n')
    for base in (("--density", "0.7"), ("--attention-plan", key)):
        outcome = wanfast(*SPARSE, *base, "--jobs", "list.jsonl", "--dry-run")
        assert outcome.exit_code == 0, outcome.err
        models = [result["effective"]["models"] for result in outcome.document["results"]]
        assert [(each["density"], each["attention_plan"]) for each in models] == [(0.5, None), (None, key)]
