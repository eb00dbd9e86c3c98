"""Tests the options of float8 attention: what a run records, what --from repeats, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.configs import effective_config
from tests.conftest import Machine
from tests.jobs.test_sparse import GOOD, Wanfast, document
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.planning import past_runs, placement
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store import curves, model_files

FP8 = (*GOOD, "--attention", "fa3-fp8", "--fp8-steps", "1:2")


def test_a_run_records_its_schedule_and_its_error_and_is_repeated(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*FP8, "--fp8-layers", "1:5", "--no-fp8-hadamard", "--attention-check")
    assert outcome.exit_code == 0, outcome.err
    first = document(workdir / "out.json")
    assert first["plan"]["attention"] == first["attention"]["kernel"] == "fa3-fp8"
    assert first["attention"]["dense"] == "flash" and first["plan"]["sparsity"] is None
    assert first["plan"]["fp8_attention"] == {"steps": [1, 2], "layers": [1, 5], "hadamard": False}
    check = first["attention_check"]
    assert [(forward["step"], forward["branch"]) for forward in check["forwards"]] == [
        (1, "prompt"), (1, "negative_prompt"),
    ]  # fmt: skip
    errors = check["forwards"][0]["relative_errors"]
    assert errors[0] is None and [len(layer) for layer in errors[1:]] == [2] * 4
    assert 1e-4 < check["mean"] <= check["of_95_percent"] <= check["largest"] < 0.2
    again = wanfast("generate", "--from", "out.json", "--output", "b.mp4")
    assert again.exit_code == 0, again.err
    second = document(workdir / "b.json")
    assert second["output_sha256"] == first["output_sha256"] and second["attention_check"] == check
    exact = wanfast("generate", "--from", "out.json", "--output", "c.mp4", "--attention", "math")
    assert exact.exit_code == 0, exact.err
    third = document(workdir / "c.json")
    assert third["plan"]["fp8_attention"] is third["attention_check"] is None
    assert third["effective"]["models"]["fp8_steps"] is third["effective"]["models"]["fp8_hadamard"] is None
    sparse = wanfast(
        "generate", "--from", "out.json", "--output", "d.mp4", "--attention", "sparse", "--density", "1", "--dry-run"
    )
    assert sparse.exit_code == 0, sparse.err  # --attention-check stays, and the options of float8 go


def test_videos_of_other_schedules_share_the_models(workdir: Path) -> None:
    sessions = Sessions(Ranks("cpu"))
    first = sessions.of(effective_config(attention="fa3-fp8"))
    assert sessions.of(effective_config(attention="fa3-fp8", fp8_steps="1:3", fp8_hadamard=True)) is first
    assert sessions.of(effective_config(attention="math")) is not first


def test_a_dry_run_shows_the_schedule(wanfast: Wanfast) -> None:
    outcome = wanfast(*FP8, "--dry-run")
    assert outcome.exit_code == 0, outcome.err
    shown = " ".join((outcome.err + outcome.out).split())
    assert "in the steps 1 to 1 of 2, counted from 0, and the layers 0 to 4, with a Hadamard matrix" in shown
    assert "fp8 attention" not in wanfast(*GOOD, "--dry-run").err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fp8-steps", "0:1"), "--fp8-steps needs --attention fa3-fp8: use --attention fa3-fp8, or drop --fp8-steps"),
        (("--attention", "math", "--fp8-hadamard"), "--fp8-hadamard needs --attention fa3-fp8"),
        (("--attention", "fa3-fp8", "--density", "0.5"), "--density needs --attention sparse"),
        (
            ("--attention-check",),
            "--attention-check needs --attention sparse or fa3-fp8: use --attention sparse, or drop",
        ),
        (("--attention", "fa3-fp8"), "of 2 steps, the first 1 and the last 1 would be exact"),
        (("--attention", "fa3-fp8", "--fp8-steps", "1-2"), "--fp8-steps 1-2: use two numbers, the first one smaller"),
        (("--attention", "fa3-fp8", "--fp8-steps", "0:3"), "--fp8-steps 0:3: there are only 2 steps, counted from 0"),
        (("--attention", "fa3-fp8", "--fp8-steps", "0:2", "--fp8-layers", "5:6"), "--fp8-layers 5:6: there are only 5"),
        (
            ("--attention", "fa3-fp8", "--fp8-steps", "0:2", "--compile", "--compile-mode", "max-autotune"),
            "--attention fa3-fp8 and --compile-mode max-autotune exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_refused(wanfast: Wanfast, options: tuple[str, ...], words: str) -> None:
    outcome = wanfast(*GOOD, *options, "--dry-run")
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err


def test_a_gpu_needs_the_package(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine(1, 84)
    outcome = wanfast(*FP8, "--device", "cuda")
    assert outcome.exit_code == 2
    assert "--attention fa3-fp8: fa3-fwd is not installed: run `pip install 'wanfast[fa3]'`" in outcome.err


NEAR_EXACT = (*GOOD, "--recipe", "near-exact", "--quantize-on-the-fly")


def test_a_recipe_leaves_a_short_video_exact(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*NEAR_EXACT, "--attention-check")
    assert outcome.exit_code == 0, outcome.err
    words = (
        "no step computes attention in float8, because the first and last steps stay exact, and the video has only 2"
    )
    assert f"note: --recipe near-exact: {words}: for float8 in all of them, add --fp8-steps 0:2" in outcome.err
    short = document(workdir / "out.json")
    assert short["plan"]["fp8_attention"]["steps"] == [0, 0] and short["attention_check"]["forwards"] == []
    assert short["attention"]["kernel"] == "fa3-fp8" and short["plan"]["overridden"] == {}
    exact = wanfast(*NEAR_EXACT, "--attention", "auto", "--output", "b.mp4")
    assert exact.exit_code == 0, exact.err
    assert document(workdir / "b.json")["output_sha256"] == short["output_sha256"]
    shown = " ".join((wanfast(*NEAR_EXACT, "--output", "c.mp4", "--dry-run").out).split())
    assert "fp8 attention in no step, because the video has few steps" in shown
    asked = wanfast(*GOOD, "--recipe", "exact", "--attention", "fa3-fp8", "--dry-run")
    assert asked.exit_code == 2 and "of 2 steps, the first 1 and the last 1 would be exact" in asked.err


@pytest.mark.parametrize(("recipe", "steps", "in_fp8"), [("near-exact", "8", [1, 7]), ("fast", "40", [5, 35])])
def test_a_recipe_s_attention_is_in_float8(
    wanfast: Wanfast, workdir: Path, recipe: str, steps: str, in_fp8: list[int]
) -> None:
    of_recipe = ("--recipe", recipe, "--steps", steps, "--output", f"{recipe}.mp4")
    outcome = wanfast(*NEAR_EXACT, *of_recipe)
    assert outcome.exit_code == 0 and "no step" not in outcome.err, outcome.err
    plan = document(workdir / f"{recipe}.json")["plan"]
    assert (plan["recipe"], plan["attention"], plan["quantize"]) == (recipe, "fa3-fp8", "fp8-rowwise")
    assert plan["fp8_attention"]["steps"] == in_fp8 and plan["overridden"] == {}
    assert bool(plan["magcache"] and plan["magcache"]["skipped_forwards"]) is (recipe == "fast")


def test_a_video_of_an_older_recipe_is_repeated_with_exact_attention(wanfast: Wanfast, workdir: Path) -> None:
    """The sidecar is that of a version in which near-exact set only --quantize."""
    assert wanfast(*NEAR_EXACT, "--attention", "flash", "--steps", "4").exit_code == 0
    older = document(workdir / "out.json")
    del older["requested"]["attention"]
    (workdir / "out.json").write_text(json.dumps(older))
    outcome = wanfast("generate", "--from", "out.json", "--output", "b.mp4")
    assert outcome.exit_code == 0, outcome.err
    again = document(workdir / "b.json")
    assert again["output_sha256"] == older["output_sha256"]
    assert again["plan"]["recipe"] == "near-exact" and again["plan"]["fp8_attention"] is None
    now = wanfast(
        "generate", "--from", "out.json", "--recipe", "near-exact", "--output", "c.mp4", "--dry-run", "--json"
    )
    assert now.document["plan"]["fp8_attention"]["steps"] == [1, 3]


def test_a_gpu_without_the_kernel_runs_no_other_one_for_a_recipe(
    wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 84)
    on_gpu = (*NEAR_EXACT, "--device", "cuda")
    outcome = wanfast(*on_gpu)
    fix = "run `pip install 'wanfast[fa3]'`, or use --attention auto"
    assert outcome.exit_code == 2 and outcome.err.splitlines()[-1] == (
        f"error: --attention fa3-fp8: fa3-fwd is not installed: {fix}"
    )
    ada = dataclasses.replace(placement.gpus.visible_gpus()[0], name="NVIDIA L40S", capability=(8, 9))
    monkeypatch.setattr(placement.gpus, "visible_gpus", lambda: [ada])
    outcome = wanfast(*on_gpu, "--dry-run")
    assert outcome.exit_code == 2
    assert outcome.err.splitlines() == [
        "error: --attention fa3-fp8 needs Hopper GPUs, not NVIDIA L40S: use --attention auto"
    ]
    followed = wanfast(*on_gpu, "--attention", "auto", "--dry-run")
    assert followed.exit_code == 0, followed.err


def test_a_curve_is_not_measured_in_float8(wanfast: Wanfast) -> None:
    outcome = wanfast("calibrate-magcache", "--model", "tiny", "--attention", "fa3-fp8")
    assert outcome.exit_code == 2
    assert "--attention fa3-fp8: `wanfast calibrate-magcache` measures exact attention: use" in outcome.err


def test_a_curve_is_measured_with_exact_attention(workdir: Path) -> None:
    files = model_files.locate("tiny", "artifacts")
    config = effective_config(attention="fa3-fp8", magcache="preset")
    assert "--attention" not in curves.calibrate_command(config, files.spec)


def test_runs_of_another_schedule_predict_no_seconds(wanfast: Wanfast, workdir: Path) -> None:
    assert wanfast(*FP8).exit_code == 0
    given = EffectiveConfig.from_json(document(workdir / "out.json")["effective"]).options()

    def predicted(**options: Any) -> float | None:
        (plan,) = placement.place([resolve({**given, "output": "b.mp4", **options}, runs=False)[0]])
        return past_runs.predicted_seconds(plan)

    assert predicted() is not None
    assert predicted(fp8_layers="1:2") is predicted(attention="auto", fp8_steps=None) is None
