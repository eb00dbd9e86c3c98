"""Tests the options of sparse attention: what a run records, what --from repeats, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.configs import effective_config
from tests.conftest import Machine, Outcome
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.planning import past_runs, placement
from wanfast.runtime.planning.plan_json import sparsity_json
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store import curves, model_files

Wanfast = Callable[..., Outcome]
# 320 tokens: three blocks. The first of the two steps is dense.
SMALL = ("--size", "128x128", "--frames", "17", "--steps", "2", "--device", "cpu")
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", *SMALL)
SPARSE = (*GOOD, "--attention", "sparse", "--density", "0.5")


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_a_run_records_its_density_and_its_error_and_is_repeated(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast(*SPARSE, "--attention-check")
    assert outcome.exit_code == 0, outcome.err
    first = document(workdir / "out.json")
    assert first["plan"]["attention"] == first["attention"]["kernel"] == "sparse"
    assert first["attention"]["dense"] == "flash"
    sparsity = first["plan"]["sparsity"]
    assert (sparsity["blocks"], sparsity["listed"], sparsity["dense_steps"]) == (3, 2, 1)
    check = first["attention_check"]
    assert [(forward["step"], forward["branch"]) for forward in check["forwards"]] == [
        (1, "prompt"), (1, "negative_prompt"),
    ]  # fmt: skip
    assert 0 < check["mean"] <= check["of_95_percent"] <= check["largest"] < 2
    again = wanfast("generate", "--from", "out.json", "--output", "b.mp4")
    assert again.exit_code == 0, again.err
    second = document(workdir / "b.json")
    assert second["output_sha256"] == first["output_sha256"] and second["attention_check"] == check
    dense = wanfast("generate", "--from", "out.json", "--output", "c.mp4", "--attention", "math")
    assert dense.exit_code == 0, dense.err
    third = document(workdir / "c.json")
    assert third["plan"]["sparsity"] is third["attention_check"] is third["effective"]["models"]["density"] is None
    assert third["output_sha256"] != first["output_sha256"]


def test_each_line_has_a_density_of_its_own(wanfast: Wanfast, workdir: Path) -> None:
    (workdir / "list.jsonl").write_text('{"density": 0.5}\n{"density": 1.0, "dense_share": 0}\n')
    outcome = wanfast(*SPARSE, "--jobs", "list.jsonl")
    assert outcome.exit_code == 0, outcome.err
    found = [document(workdir / f"out-000{line}.json")["plan"]["sparsity"] for line in (1, 2)]
    assert [(each["listed"], each["dense_steps"]) for each in found] == [(2, 1), (3, 0)]


def test_videos_of_other_densities_share_the_models(workdir: Path) -> None:
    sessions = Sessions(Ranks("cpu"))
    first = sessions.of(effective_config(attention="sparse", density=0.5))
    assert sessions.of(effective_config(attention="sparse", density=0.3, lists_every=2, attention_check=True)) is first
    assert sessions.of(effective_config(attention="math")) is not first


def test_a_dry_run_shows_the_density(wanfast: Wanfast) -> None:
    outcome = wanfast(*SPARSE, "--dry-run")
    assert outcome.exit_code == 0, outcome.err
    shown = " ".join(outcome.err.split()) + " ".join(outcome.out.split())
    assert "2 of 3 blocks of 128 tokens: density 0.67; dense in the first 1 of 2 steps and the first 1 layers" in shown
    assert "mean density of the video 0.87" in shown
    whole = wanfast(*GOOD, "--attention", "sparse", "--density", "1", "--dry-run")
    assert "has 3 blocks of 128 tokens, and all of them are computed: this saves no time" in whole.err
    kept = wanfast(*GOOD, "--attention", "sparse", "--density", "0.1", "--dry-run")
    assert (
        "each list must hold at least 2 of them (the first frame's and one more): the density is 0.67, not 0.1"
        in " ".join(kept.err.split())
    )
    both = wanfast(*GOOD, "--attention", "sparse", "--density", "0.1", "--last-image", "cat.png", "--dry-run")
    assert "3 blocks of 128 tokens, and all of them are computed" in " ".join(both.err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--density", "0.5"), "--density needs --attention sparse: use --attention sparse, or drop --density"),
        (("--attention", "math", "--lists-every", "2"), "--lists-every needs --attention sparse"),
        (("--attention-check",), "--attention-check needs --attention sparse"),
        (("--dense-layers", "2"), "--dense-layers needs --attention sparse"),
        (("--dense-share", "0.5"), "--dense-share needs --attention sparse"),
        (("--attention", "sparse"), "--attention sparse needs --density or --attention-plan: add --density 0.35"),
        (("--attention", "sparse", "--density", "0"), "--density 0.0: use a share over 0"),
        (("--attention", "sparse", "--density", "1.5"), "--density 1.5: use a share over 0"),
        (("--attention", "sparse", "--density", "0.5", "--dense-share", "1"), "--dense-share 1.0: use a share"),
        (
            ("--attention", "sparse", "--density", "0.5", "--dense-share", "0.9"),
            "all 2 steps would use dense attention",
        ),
        (("--attention", "sparse", "--density", "0.5", "--dense-layers", "90"), "layers would use dense attention"),
        (("--attention", "sparse", "--density", "0.5", "--lists-every", "0"), "--lists-every 0: use 1 to 1000 steps"),
        (
            ("--attention", "sparse", "--density", "0.5", "--compile", "--compile-mode", "max-autotune"),
            "--attention sparse and --compile-mode max-autotune exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_refused(wanfast: Wanfast, options: tuple[str, ...], words: str) -> None:
    outcome = wanfast(*GOOD, *options, "--dry-run")
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err


def test_a_gpu_needs_the_kernel_s_package(wanfast: Wanfast, workdir: Path, machine: Machine) -> None:
    machine(1, 84)
    asked = (*SPARSE, "--device", "cuda")
    fix = "run `pip install 'wanfast[fa4]'`, or use --attention auto"
    words = f"--attention sparse: flash-attn-4 is not installed: {fix}"
    outcome = wanfast(*asked)
    assert outcome.exit_code == 2 and words in outcome.err
    planned = wanfast(*asked, "--dry-run")
    assert planned.exit_code == 0 and f"note: {words}" in planned.err


@pytest.mark.parametrize("kernel", ["sparse", "fa3-fp8"])
def test_a_gpu_of_another_generation_is_refused(
    wanfast: Wanfast, workdir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    own = ("--density", "0.5") if kernel == "sparse" else ()
    machine(1, 84)
    hopper = placement.gpus.visible_gpus()
    for capability in ((8, 0), (10, 0)):
        other = dataclasses.replace(hopper[0], name="NVIDIA A100", capability=capability)
        monkeypatch.setattr(placement.gpus, "visible_gpus", lambda other=other: [*hopper, other])
        outcome = wanfast(*GOOD, "--attention", kernel, *own, "--device", "cuda", "--dry-run")
        words = f"--attention {kernel} needs Hopper GPUs, not NVIDIA A100: use --attention auto"
        assert outcome.exit_code == 2 and words in outcome.err
    assert wanfast(*GOOD, "--attention", kernel, *own, "--fp8-steps", "0:2", "--dry-run").exit_code == (
        2 if kernel == "sparse" else 0
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench", "`wanfast bench` does not take this value, because its TFLOP/s count all blocks"),
        ("calibrate-magcache", "`wanfast calibrate-magcache` measures exact attention"),
    ],
)
def test_other_commands_have_no_sparse_attention(wanfast: Wanfast, command: str, words: str) -> None:
    outcome = wanfast(command, "--model", "tiny", "--attention", "sparse")
    assert outcome.exit_code == 2 and f"--attention sparse: {words}" in outcome.err


def test_lists_stand_in_the_memory_plan(wanfast: Wanfast, workdir: Path) -> None:
    """At 1280x720 the lists of both branches take more than a gigabyte; a rank of four holds its own heads' alone."""
    own = {"model": "a14b", "image": "cat.png", "prompt": "a cat", "device": "cpu", "size": "1280x720", "fit": "crop"}
    plan, _ = resolve({**own, "attention": "sparse", "density": 0.35}, runs=False)
    one, four = (plan.list_bytes(mesh) for mesh in (plan.mesh, type(plan.mesh)(cfg=2, ulysses=2)))
    assert one == 4 * four == 2 * 39 * 40 * 591 * 208 * 4
    need = placement._need([plan], plan.mesh)
    assert placement._in_loop(need) == {"loop": need.loop, "lists of blocks": one}
    dense, _ = resolve(own, runs=False)
    assert dense.list_bytes(dense.mesh) == 0 and sparsity_json(dense) is None


def test_a_curve_is_measured_with_dense_attention(workdir: Path) -> None:
    files = model_files.locate("tiny", "artifacts")
    config = effective_config(attention="sparse", density=0.5, magcache="preset")
    assert "--attention" not in curves.calibrate_command(config, files.spec)


def test_runs_of_another_density_predict_no_seconds(wanfast: Wanfast, workdir: Path) -> None:
    assert wanfast(*SPARSE).exit_code == 0
    given = EffectiveConfig.from_json(document(workdir / "out.json")["effective"]).options()
    same, other, dense = (
        {**given, "output": "b.mp4", **options}
        for options in ({}, {"density": 1.0}, {"attention": "auto", "density": None})
    )
    predicted = [past_runs.predicted_seconds(placed(options)) for options in (same, other, dense)]
    assert predicted[0] is not None and predicted[1:] == [None, None]


def placed(options: dict[str, Any]) -> Any:
    (plan,) = placement.place([resolve(options, runs=False)[0]])
    return plan
