"""Tests `wanfast calibrate-magcache`, and the options of `generate` that use the stored curve."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import lora_files
from tests.conftest import Machine, Outcome
from tests.on_ranks import on_ranks
from wanfast.commands import calibrate_magcache, calibration
from wanfast.commands.calibration import PlannedSet
from wanfast.magcache_calib import clips
from wanfast.magcache_calib.ratios import against_preset, averaged
from wanfast.magcache_calib.recorder import Recorder
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import session
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.planning import past_runs
from wanfast.runtime.planning.completed import effective
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.curves import preset

Wanfast = Callable[..., Outcome]
SHAPE = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "6")
CALIBRATE = ("calibrate-magcache", *SHAPE, "--set", "set", "--json")
FEW = (*CALIBRATE, "--steps", "2")
SHOWN = ("generate", *SHAPE, "--image", "cat.png", "--prompt", "a cat", "--seed", "1")
GENERATE = (*SHOWN, "--json")
DRY = (*GENERATE, "--dry-run")


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Writes a set of two clips."""
    (workdir / "set").mkdir()
    shutil.copy("cat.png", "set/a.png")
    lines = [{"image": "a.png", "prompt": "a cat jumps"}, {"image": "a.png", "prompt": "a cat sleeps"}]
    (workdir / "set/clips.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return workdir / "set"


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


@pytest.fixture
def measured(wanfast: Wanfast, folder: Path, curves: Path) -> dict[str, Any]:
    """Stores the curve of `folder`, which is measured once for all tests, and returns the document of the command."""
    shutil.copytree(curves, "artifacts/magcache")
    document = wanfast(*CALIBRATE).document
    shutil.copytree("artifacts/magcache", curves, dirs_exist_ok=True)
    return document


def test_a_curve_is_measured_stored_and_used(wanfast: Wanfast, folder: Path, figures: list[Any]) -> None:
    outcome = wanfast(*CALIBRATE)
    assert outcome.exit_code == 0, outcome.err
    found = outcome.document
    artifact = Path(found["output"])
    assert sorted(file.name for file in artifact.iterdir()) == ["manifest.json", "ratios.json", "ratios.png"]
    assert (artifact / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert f"{artifact / 'ratios.png'}: the curve" in outcome.err
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    of_branch = ["prompt", "prompt, spread between tokens"]
    assert legend == [*of_branch, *(f"negative {words}" for words in of_branch), "the low-noise expert begins"]
    assert found["clips"] == 2 and len(found["ratios"]) == 6 and found["ratios"][0] == [1.0, 1.0]
    for step, row in enumerate(found["ratios"][1:], 1):
        is_of_one_expert = found["experts"][step] == found["experts"][step - 1]
        assert all(0.5 < ratio < 1.2 if is_of_one_expert else 0.1 < ratio < 1.5 for ratio in row), step
    assert all(0 < spread < 1 for row in found["spread"][1:] for spread in row)
    assert found["preset"] is None  # because the preset has other steps
    assert json.loads((artifact / "ratios.json").read_text())["ratios"] == found["ratios"]

    again = wanfast(*CALIBRATE)
    assert again.document["was_there"] and again.document["ratios"] == found["ratios"]

    made = wanfast(*GENERATE, "--magcache", "artifact", "--magcache-thresh", "9", "--retention-ratio", "0")
    plan = made.document["plan"]["magcache"]
    assert plan["curve"] == made.document["effective"]["skipping"]["magcache"] == artifact.name
    high = made.document["plan"]["steps"]["high_noise"]
    skips = [False] * (high + 1) + [True, True, False, True, True][: 5 - high]
    assert plan["skips_prompt"] == plan["skips_negative_prompt"] == skips
    assert (plan["total_forwards"], plan["skipped_forwards"]) == (12, 2 * sum(skips))
    repeated = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert repeated.document["output_sha256"] == made.document["output_sha256"]
    whole = wanfast("generate", "--from", "out.json", "--magcache", "off", "--output", "whole.mp4", "--json")
    assert whole.document["plan"]["magcache"] is None
    assert whole.document["output_sha256"] != made.document["output_sha256"]


def test_a_run_that_was_cut_off_goes_on(wanfast: Wanfast, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanfast.magcache_calib import calibrate
    from wanfast.runtime.jobs.loop import measuring

    whole = wanfast(*FEW, "--artifacts-dir", "other").document["ratios"]
    made, measure = Path("made"), calibrate.measure

    def noted(index: int, *arguments: Any) -> dict[str, Any]:
        if not Path("whole").exists() and made.exists():
            os._exit(1)
        with made.open("a") as stream:
            stream.write(f"{index} ")
        return measure(index, *arguments)

    monkeypatch.setattr(calibrate, "run", measuring(noted))
    assert wanfast(*FEW).exit_code == 5
    assert not list(Path("artifacts/magcache").glob("*/manifest.json"))
    Path("whole").touch()
    outcome = wanfast(*FEW)
    assert "1 of 2 clips were measured in an earlier run" in outcome.err
    assert made.read_text() == "0 0 "  # one clip in each run
    assert outcome.document["ratios"] == whole


def test_any_number_of_ranks_measures_the_same(wanfast: Wanfast, folder: Path) -> None:
    """The clips have 18 tokens, which 4 ranks do not divide."""
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save("set/a.png")
    curves = []
    for ranks in (
        (),
        ("--num-gpus", "4", "--cfg-parallel", "1"),
        ("--num-gpus", "2", "--dit-fsdp", "on"),  # each rank has a branch
    ):
        outcome = wanfast(
            *CALIBRATE, "--size", "48x48", "--steps", "3", "--precision", "fp32",
            "--artifacts-dir", f"artifacts{len(curves)}", *ranks,
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.err
        curves.append([outcome.document[name] for name in ("ratios", "spread", "cosine_distance")])
    for other in curves[1:]:
        assert torch.allclose(torch.tensor(other), torch.tensor(curves[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ulysses=4), Mesh(cfg=2, ulysses=2), Mesh(ulysses=8)], ids=str)
def test_what_is_measured(mesh: Mesh) -> None:
    """The recorder equals the formulas over all 10 tokens, also where 4 and 8 ranks add padding."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 1, 10, 6, generator=generator)

    def work(ranks: Ranks) -> list[dict[str, Any]]:
        recorder = Recorder(ranks, 10)
        for step, residual in enumerate((first, second)):
            own = ranks.sequence.shard(residual, 1)
            padding = ranks.sequence.shard(torch.ones(1, 10, 1), 1) == 0
            for branch in ranks.guidance.own(("prompt", "negative_prompt")):
                scale = 1 if branch == "prompt" or step == 0 else 3
                recorder.keep(step, branch, torch.where(padding, torch.inf, own * scale))
        if ranks.guidance.own(("prompt",)) and mesh.cfg == 2:
            assert recorder.wants(0, "prompt") != recorder.wants(0, "negative_prompt")
        return recorder.measured(2)

    for found in on_ranks(mesh, work) if mesh.group_size > 1 else [work(Ranks("cpu"))]:
        assert found[0] == {"prompt": None, "negative_prompt": None}
        ratios = second.double().norm(dim=-1) / first.double().norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
        for branch, scale in (("prompt", 1), ("negative_prompt", 3)):
            assert found[1][branch] == pytest.approx(
                {
                    "ratio": scale * float(ratios.mean()),
                    "spread": scale * float(ratios.std()),
                    "cosine_distance": 1 - float(cosine.mean()),
                },
                rel=1e-5,
            )


def test_the_curve_is_the_mean_of_the_clips() -> None:
    def step(ratio: float) -> dict[str, float]:
        return {"ratio": ratio, "spread": 0.1, "cosine_distance": 0.2}

    nothing = {"prompt": None, "negative_prompt": None}
    unguided = {"prompt": step(0.7), "negative_prompt": None}
    measured = [
        {"steps": [nothing, {"prompt": step(0.9), "negative_prompt": step(0.8)}, unguided]},
        {"steps": [nothing, {"prompt": step(0.7), "negative_prompt": step(0.8)}, unguided]},
    ]
    found = averaged(measured)
    assert found["ratios"] == [[1.0, 1.0], [0.8, 0.8], [0.7, 0.7]]
    assert found["scatter"] == [[0.0, 0.0], [pytest.approx(math.sqrt(0.02)), 0.0], [0.0, 0.0]]
    assert found["spread"][1] == [0.1, 0.1] and found["cosine_distance"][2] == [0.2, 0.2]


@pytest.mark.slow
def test_another_seed_of_the_shipped_set_agrees_with_the_preset(
    wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset was measured with seed 0. One clip of four, with half of its frames, is enough to agree with it."""
    read = clips.read_set
    monkeypatch.setattr(calibration, "read_set", lambda *arguments, **named: read(*arguments, **named)[:1])
    outcome = wanfast(
        "calibrate-magcache", "--model", "tiny", "--device", "cpu", "--frames", "9", "--seed", "50", "--json"
    )
    assert outcome.exit_code == 0, outcome.err
    found, known = outcome.document, preset(model_files.locate("tiny", "artifacts"))
    assert known is not None
    assert found["clips"] == 1 and found["preset"]["steps"] == [] and "the preset agrees" in outcome.err
    assert found["ratios"] != known["ratios"]
    for step in range(1, 40):
        for branch in (0, 1):
            apart = abs(found["ratios"][step][branch] - known["ratios"][step][branch])
            assert apart < found["spread"][step][branch], (step, branch)


def test_the_preset_is_of_the_tiny_model_that_ships() -> None:
    files = model_files.locate("tiny", "artifacts")
    document = preset(files)
    assert document is not None
    assert document["experts"] == {name: files.fingerprint(name) for name in ("high_noise", "low_noise")}
    assert document["steps"] == files.spec.steps == len(document["ratios"])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--steps", "7"], 3, "KEY has steps 6, this run has 7"),
        (["--precision", "fp32"], 3, "KEY has precision bf16, this run has fp32"),
        (["--guidance-low-noise", "3"], 3, "KEY has guidance "),
        (["--size", "96x96"], 3, "KEY has size "),
        (["--solver", "euler"], 3, "KEY has solver "),
        (["--steps", "7", "--magcache-interpolate"], 0, ""),
        (["--shift", "3", "--magcache-interpolate"], 0, ""),
        (["--precision", "fp32", "--magcache-interpolate"], 3, "KEY has precision "),
        (["--magcache", "0123456789ab"], 3, "no curve has this key; use one of KEY"),
    ],
    ids=str,
)  # fmt: skip
def test_a_curve_of_another_run_is_refused(
    wanfast: Wanfast, measured: dict[str, Any], options: list[str], code: int, words: str
) -> None:
    key = measured["key"]
    outcome = wanfast(*DRY, "--magcache", "artifact", *options)
    assert outcome.exit_code == code and words.replace("KEY", key) in outcome.err, outcome.err
    if code == 0:
        assert outcome.document["plan"]["magcache"]["interpolated_from"] == {"steps": 6, "shift": 5.0}
        assert outcome.document["plan"]["magcache"]["curve"] == key
    else:
        assert "run `wanfast calibrate-magcache --model tiny" in outcome.err and len(outcome.err.splitlines()) == 1
    if "KEY has steps" in words:
        assert "or add --magcache-interpolate" in outcome.err


def test_the_command_of_a_refusal_fixes_it(wanfast: Wanfast, folder: Path) -> None:
    refused = wanfast(*DRY, "--magcache", "artifact", "--guidance-low-noise", "3", "--steps", "2")
    command = refused.err.split("`")[1].split()
    assert command[0] == "wanfast" and wanfast(*command[1:], "--set", "set").exit_code == 0
    assert wanfast(*DRY, "--magcache", "artifact", "--guidance-low-noise", "3", "--steps", "2").exit_code == 0


def test_an_edited_curve_is_refused(wanfast: Wanfast, measured: dict[str, Any]) -> None:
    artifact = Path(measured["output"])
    file = artifact / "ratios.json"
    whole = file.read_text()
    file.write_text(whole.replace("1.0", "0.5", 1))
    outcome = wanfast(*DRY, "--magcache", "artifact")
    assert outcome.exit_code == 4 and f"{artifact} was changed after it was made" in outcome.err
    file.write_text(whole)
    assert wanfast(*DRY, "--magcache", "artifact").exit_code == 0
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["inputs"]["steps"] = 7
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    outcome = wanfast(*DRY, "--magcache", "artifact", "--steps", "7")
    assert outcome.exit_code == 4 and "was changed after it was made" in outcome.err
    assert "run `wanfast calibrate-magcache" in outcome.err


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """Returns a list that grows with each call of a function."""
    function, calls = getattr(owner, name), []

    def count(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_a_list_looks_for_each_curve_once(
    wanfast: Wanfast, measured: dict[str, Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = counted(monkeypatch, ArtifactStore, "find")
    listed = counted(monkeypatch, ArtifactStore, "manifests")
    hashed = counted(monkeypatch, model_files, "identity")
    asked = []
    for lines in (1, 4):
        rows = [{"prompt": f"cat {line}", "seed": line, "output": f"{line}.mp4"} for line in range(lines)]
        (workdir / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert wanfast(*DRY, "--magcache", "artifact", "--jobs", "jobs.jsonl").exit_code == 0
        asked.append([len(calls) for calls in (verified, listed, hashed)])
        for calls in (verified, listed, hashed):
            calls.clear()
    assert asked[0] == asked[1] and all(asked[0])


def test_a_calibration_asks_for_the_gpus_once(wanfast: Wanfast, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    asked = counted(monkeypatch, pynvml, "nvmlInit")
    monkeypatch.setattr(calibrate_magcache, "result_of", lambda *arguments, **named: {})
    monkeypatch.setattr(calibrate_magcache, "describe", lambda result: "")
    without_device = [word for word in CALIBRATE if word not in ("--device", "cpu")]
    assert wanfast(*without_device).exit_code == 0
    assert len(asked) == 1


def test_several_sets_want_a_name(wanfast: Wanfast, measured: dict[str, Any]) -> None:
    keys = [measured["key"], wanfast(*CALIBRATE, "--seed", "1").document["key"]]
    outcome = wanfast(*DRY, "--magcache", "artifact")
    assert outcome.exit_code == 2 and all(key in outcome.err for key in keys)
    chosen = wanfast(*DRY, "--magcache", keys[1]).document
    assert chosen["plan"]["magcache"]["curve"] == keys[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "clips.jsonl: No such file or directory: write one line per clip"),
        ("\n\n", "names no clip"),
        ('{"image": "a.png"}', 'line 1 of clips.jsonl needs the keys image and prompt, such as {"image": "cat.jpg"'),
        ('{"image": "a.png", "prompt": " "}', "line 1 of clips.jsonl has no prompt"),
        ('{"image": "none.png", "prompt": "a cat"}', "set/none.png: no such file; check the path"),
    ],
)
def test_a_set_that_cannot_be_read(wanfast: Wanfast, folder: Path, content: str | None, words: str) -> None:
    (folder / "clips.jsonl").unlink()
    if content is not None:
        (folder / "clips.jsonl").write_text(content)
    outcome = wanfast(*CALIBRATE)
    assert outcome.exit_code == 2 and words in outcome.err and f"--set {folder.absolute()}" in outcome.err
    assert not Path("artifacts").exists()


def test_the_shipped_sets_are_whole() -> None:
    tiny = model_files.locate("tiny", "artifacts").spec
    for spec in (tiny, A14B):
        found = clips.read_set(clips.shipped_set(spec), 0)
        assert len(found) == 4 and len({clip.image_sha256 for clip in found}) == 4
    assert clips.digest_of(found) != clips.digest_of(clips.read_set(clips.shipped_set(A14B), 1))


A14B_SHOWN = ("generate", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--dry-run")
A14B_DRY = (*A14B_SHOWN, "--json")


def test_a_dry_run_shows_the_plan(wanfast: Wanfast, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8, 84)
    spelt = ("--magcache", "preset", "--magcache-thresh", "0.12", "--magcache-k", "2", "--retention-ratio", "0.2")
    short, long = (wanfast(*A14B_DRY, *options).document for options in (("--magcache", "E012K2R20"), spelt))
    plan = short["plan"]["magcache"]
    assert plan == long["plan"]["magcache"]
    assert (plan["total_forwards"], plan["skipped_forwards"], plan["skipped_share"]) == (80, 22, 0.275)
    assert "".join(".#"[not skip] for skip in plan["skips_prompt"]) == "####################..#..#..#..#.#.#.###"
    assert short["predicted_s"] is None
    monkeypatch.setenv("COLUMNS", "120")
    said = wanfast(*A14B_SHOWN, "--magcache", "E012K2R20", "--magcache-rule", "both-experts", "--num-gpus", "8").out
    assert "38 of 80 forwards skipped (47.5%); both branches skip together (38 forwards if each skipped alone)" in said
    assert "###..#..#..#..#|######..#..#..#..#.#.#.## both branches" in said and "curve preset" in said
    assert "negative prompt" not in said


def test_a_plan_is_timed_by_runs_like_it(wanfast: Wanfast) -> None:
    options = (*GENERATE[:-1], "--magcache", "preset", "--magcache-interpolate", "--json")
    made = wanfast(*options).document
    later = 10 - made["plan"]["magcache"]["skipped_forwards"]  # after the first step, which waited for compilers
    whole = wanfast(*DRY, "--overwrite").document
    expected = (made["seconds"]["denoise"] - made["first_step_s"]) / later * 12
    assert whole["predicted_s"] == pytest.approx(expected, abs=2e-3)
    pair = wanfast(*DRY, "--overwrite", "--num-gpus", "2").document
    assert pair["predicted_s"] is None  # runs of another mesh predict nothing
    assert wanfast(*DRY, "--overwrite", "--precision", "fp32").document["predicted_s"] is None
    assert "as in an earlier run like this" in wanfast(*SHOWN, "--dry-run", "--overwrite").out.replace("\n", " ")


def test_branches_on_different_ranks_take_their_turns_together() -> None:
    plan: dict[str, Any] = {
        "steps": {"high_noise": 1, "low_noise": 3},
        "guidance": {"high_noise": 1.0, "low_noise": 3.5},
        "magcache": {"skips_prompt": [False, False, True, True], "skips_negative_prompt": [False, False, False, True]},
        "mesh": {"cfg": 1},
    }
    assert past_runs.forwards_in_turn(plan) == [1, 2, 1, 0]
    assert past_runs.forwards_in_turn(plan | {"mesh": {"cfg": 2}}) == [1, 1, 1, 0]
    regrouping = {"mesh": {"cfg": 2, "ulysses": 2}, "unguided_mesh": {"cfg": 1, "ulysses": 4}}
    assert past_runs.forwards_in_turn(plan | regrouping) == [0.5, 1, 1, 0]  # all ranks share the first one
    assert past_runs.forwards_in_turn(plan | {"magcache": None}) == [1, 2, 2, 2]
    skips = plan["magcache"]
    older = {"skips_cond": skips["skips_prompt"], "skips_uncond": skips["skips_negative_prompt"]}
    assert past_runs.forwards_in_turn(plan | {"magcache": older}) == [1, 2, 1, 0]


def test_a_budget_takes_the_least_error(wanfast: Wanfast, machine: Machine) -> None:
    machine(2, 141)

    def plan(*options: str) -> dict[str, Any]:
        outcome = wanfast(*A14B_DRY, "--magcache", "preset", *options)
        assert outcome.exit_code == 0, outcome.err
        found: dict[str, Any] = outcome.document["plan"]["magcache"]
        return found

    apart = ("--magcache-joint", "off")
    greedy = plan("--magcache-rule", "both-experts", *apart)
    same = plan("--magcache-skip", str(greedy["skipped_forwards"]), *apart)
    assert same["skipped_forwards"] == greedy["skipped_forwards"] == 38 and same["plan"] == "least error"
    assert same["accumulated_error"] < greedy["accumulated_error"]
    assert plan("--magcache-budget", "0.6")["skipped_forwards"] == 32
    assert plan("--magcache-skip", "17", *apart)["skipped_forwards"] == 17
    assert plan("--magcache-budget", "0.59")["skipped_forwards"] == 32  # both branches skip together
    unguided = ("--guidance-high-noise", "1", "--magcache-rule", "low-noise-only", "--num-gpus", "2")
    assert plan("--magcache-budget", "0.61", *unguided)["skipped_forwards"] == 24  # of 65 forwards; 25 would be 0.61
    for options, words in (
        (
            ("--magcache-skip", "60", *apart),
            "--magcache-skip 60: at most 43 forwards can be skipped with --magcache-rule",
        ),
        (("--magcache-skip", "17"), "because both branches skip together: use --magcache-skip 16"),
        (
            ("--magcache-budget", "0.6375", "--num-gpus", "2", "--magcache-rule", "low-noise-only"),
            "at most 28 forwards",
        ),
        (
            ("--magcache-budget", "0.6", "--magcache-rule", "low-noise-only"),
            "--magcache-budget 0.6: at most 28 forwards",
        ),
    ):
        outcome = wanfast(*A14B_DRY, "--magcache", "preset", *options)
        assert outcome.exit_code == 2 and words in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--magcache", "on"], "--magcache 'on': use 'off', 'preset', 'artifact'"),
        (["--magcache-k", "2"], "--magcache-k needs --magcache"),
        (["--magcache-rule", "both-experts"], "--magcache-rule needs --magcache"),
        (["--magcache-joint", "off"], "--magcache-joint needs --magcache"),
        (["--magcache-interpolate"], "--magcache-interpolate needs --magcache"),
        (["--magcache", "E012K2R20", "--magcache-thresh", "0.1"], "and --magcache-thresh exclude each other"),
        (["--magcache", "E012K2R20", "--magcache-budget", "0.5"], "and --magcache-budget exclude each other"),
        (["--magcache", "preset", "--magcache-thresh", "0.1", "--magcache-budget", "0.5"], "exclude each other"),
        (["--magcache", "preset", "--magcache-skip", "3", "--magcache-budget", "0.5"], "exclude each other"),
        (["--magcache", "preset", "--magcache-thresh", "0"], "--magcache-thresh 0.0: use"),
        (["--magcache", "E000K2R20"], "--magcache E000K2R20: --magcache-thresh 0.0: use"),
        (["--magcache", "E012K0R20"], "--magcache E012K0R20: --magcache-k 0: use"),
        (["--magcache", "preset", "--solver", "euler"], "but this run has 40 steps with euler at shift 5: run `"),
        (["--magcache", "preset", "--magcache-k", "0"], "--magcache-k 0: use"),
        (["--magcache", "preset", "--retention-ratio", "1.5"], "--retention-ratio 1.5: use"),
        (["--magcache", "preset", "--magcache-budget", "0"], "--magcache-budget 0.0: use"),
        (["--magcache", "preset", "--magcache-skip", "-1"], "--magcache-skip -1: use"),
        (
            ["--magcache", "preset", "--steps", "30"],
            "the curve is for 40 steps with unipc at shift 5, but this run has 30",
        ),
        (
            ["--magcache", "preset", "--shift", "3"],
            "but this run has 40 steps with unipc at shift 3: add --magcache-interpolate",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be(wanfast: Wanfast, options: list[str], words: str) -> None:
    outcome = wanfast(*A14B_DRY, *options)
    assert outcome.exit_code == 2 and words in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_curve_that_changed_since_the_plan_is_refused_by_the_worker(
    wanfast: Wanfast, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Path(measured["output"])
    load = session.load_models

    def meanwhile(*arguments: Any) -> Any:
        (artifact / "ratios.json").write_text("{}")
        return load(*arguments)

    monkeypatch.setattr(session, "load_models", meanwhile)
    outcome = wanfast(*GENERATE, "--magcache", "artifact")
    assert outcome.exit_code == 4 and "was changed after it was made" in outcome.err
    assert not Path("out.mp4").exists()


def test_a_preset_is_of_its_weights(wanfast: Wanfast, workdir: Path) -> None:
    shutil.copytree(model_files.TINY, "copy")
    asked = ("--image", "cat.png", "--prompt", "a cat", "--dry-run", "--magcache", "E012K2R20")
    own = ("generate", "--model", "copy", "--device", "cpu", *asked)
    assert wanfast(*own).exit_code == 0
    weights = next(Path("copy/transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = wanfast(*own)
    assert outcome.exit_code == 2 and "no curve ships for these weights" in outcome.err
    other = wanfast(*A14B_DRY, "--device", "cpu", "--magcache", "E012K2R20", "--precision", "fp32")
    own = "run `wanfast calibrate-magcache --precision fp32`, and then this command with --magcache artifact"
    assert f"its curve was measured with bf16, not fp32; for a curve of this run, {own}" in other.err


def test_the_note_on_a_preset_names_no_calibration_for_distilled_steps(
    wanfast: Wanfast, machine: Machine, workdir: Path
) -> None:
    machine(1, 141)
    lora_files.write(workdir / "low_noise_model.safetensors", {"blocks.0.ffn.0.diff_b": torch.zeros(1)})
    asked = (
        "--recipe",
        "hybrid",
        "--lora-low-noise",
        "low_noise_model.safetensors",
        "--magcache",
        "preset",
        "--precision",
        "fp32",
    )
    outcome = wanfast(*A14B_DRY, *asked, "--magcache-rule", "both-experts")
    (line,) = (line for line in outcome.err.splitlines() if "its curve was measured" in line)
    assert line.endswith("bf16, not fp32")


def test_any_number_of_gpus_skips_alike(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(2, 141)
    skips = ("--magcache", "E024K2R10", "--magcache-rule", "both-experts")
    one, two = (wanfast(*A14B_DRY, *skips, "--num-gpus", count).document for count in ("1", "2"))
    assert two["plan"]["mesh"]["cfg"] == 2 and one["plan"]["magcache"]["skipped_forwards"] > 0
    names = ("skips_prompt", "skips_negative_prompt")
    assert [one["plan"]["magcache"][name] for name in names] == [two["plan"]["magcache"][name] for name in names]
    apart = wanfast(*A14B_DRY, *skips, "--magcache-joint", "off").document
    assert apart["plan"]["magcache"]["skipped_forwards"] > one["plan"]["magcache"]["skipped_forwards"]


def test_an_earlier_run_is_repeated_with_its_skips(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(2, 141)
    two = wanfast(*A14B_DRY, "--magcache", "E012K2R20", "--magcache-rule", "both-experts", "--num-gpus", "2").document
    assert two["effective"]["skipping"]["magcache_joint"] == "on"
    two["weights"] = {}
    (workdir / "two.json").write_text(json.dumps(two))
    again = ("generate", "--from", "two.json", "--dry-run", "--json")
    one = wanfast(*again, "--num-gpus", "1").document
    names = ("skips_prompt", "skips_negative_prompt")
    assert [one["plan"]["magcache"][name] for name in names] == [two["plan"]["magcache"][name] for name in names]
    budget = wanfast(*again, "--magcache-budget", "0.6").document["plan"]["magcache"]
    assert (budget["plan"], budget["rule"], budget["skipped_forwards"]) == ("least error", "both-experts", 32)
    alone = wanfast(*A14B_DRY, "--magcache", "E012K2R20").document
    assert (alone["effective"]["skipping"]["magcache_joint"], alone["effective"]["skipping"]["magcache_rule"]) == (
        "on",
        "low-noise-only",
    )
    alone["weights"] = {}
    (workdir / "two.json").write_text(json.dumps(alone))
    assert wanfast(*again, "--magcache-budget", "0.6").document["plan"]["magcache"]["rule"] == "both-experts"


def test_lines_of_a_list_skip_as_they_say(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(1, 141)
    lines = [{}, {"magcache": "off"}, {"magcache": "E006K2R20"}, {"magcache_budget": 0.6}, {"magcache_skip": 70}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base = ("--magcache", "preset", "--magcache-thresh", "0.12")
    outcome = wanfast(*A14B_DRY, *base, "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 6
    *planned, failed = outcome.document["results"]
    skipped = [line["plan"]["magcache"] and line["plan"]["magcache"]["skipped_forwards"] for line in planned]
    assert skipped == [22, None, 18, 32]
    assert "--magcache-skip 70: at most" in failed["error"]


def test_residuals_are_in_the_plan(wanfast: Wanfast, machine: Machine) -> None:
    machine(8, 84)
    for ranks, tokens, branches in (((), 1, 2), (("--num-gpus", "8"), 4, 1)):
        plan = wanfast(*A14B_DRY, "--magcache", "E012K2R20", *ranks).document["plan"]
        own = -(-plan["tokens"] // tokens)
        assert plan["magcache"]["residual_bytes"] == branches * own * 5120 * 4


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--steps", "1"], 2, "--steps 1: the curve compares each step with the step before"),
        (["--quantize", "int8-weight-only"], 3, "run `wanfast quantize --model tiny --scheme int8-weight-only"),
        (["--verify"], 2, "--verify reads what `wanfast quantize` stored"),
    ],
)
def test_a_calibration_that_cannot_be(
    wanfast: Wanfast, folder: Path, options: list[str], code: int, words: str
) -> None:
    outcome = wanfast(*CALIBRATE, *options)
    assert outcome.exit_code == code and words in outcome.err
    assert not Path("artifacts/runs").exists()


def test_a_clip_that_is_not_whole_is_measured_again(wanfast: Wanfast, folder: Path) -> None:
    first = wanfast(*FEW).document
    shutil.rmtree(first["output"])
    kept = sorted(Path("artifacts/magcache_clips").iterdir())
    assert len(kept) == 2
    document = json.loads(kept[0].read_text())
    document["measured"]["steps"].pop()
    kept[0].write_text(json.dumps(document))
    outcome = wanfast(*FEW)
    assert "1 of 2 clips were measured in an earlier run" in outcome.err
    assert outcome.document["ratios"] == first["ratios"]


def test_where_a_curve_and_the_preset_differ(tmp_path: Path) -> None:
    files = model_files.locate("tiny", "artifacts")
    config = effective({"model": "tiny", "image": "cat.png", "prompt": "a", "device": "cpu"}, files, "")
    known = preset(files)
    assert known is not None
    curve = {"ratios": [list(row) for row in known["ratios"]], "spread": [[0.01, 0.01] for _ in known["ratios"]]}
    found = against_preset(curve, config, files)
    assert found is not None and (found["differs"], found["steps"]) == (False, [])
    curve["spread"][39] = [0.2, 0.2]
    curve["ratios"][39][0] += 0.1  # within the curve's spread
    curve["ratios"][5][1] += 0.02  # beyond the curve's spread
    curve["ratios"][15][0] = 0.5  # the low-noise expert's first step
    found = against_preset(curve, config, files)
    assert found == {"differs": True, "steps": [5], "worst": {"step": 5, "difference": 0.02, "spread": 0.01}}
    assert against_preset(curve, config.replace(steps=30), files) is None
    assert against_preset(curve, config.replace(last_image="last.png"), files) is None  # no curve ships for these


def test_a_calibration_keeps_two_residuals_of_a_branch(
    folder: Path, wanfast: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that decides placement counts the residual of this step and of the step before."""
    seen: list[Plan] = []

    def noted(given: dict[str, Any], planned: PlannedSet) -> None:
        seen.extend(planned.plans)
        raise ConfigError("nothing is measured")

    monkeypatch.setattr(calibrate_magcache, "result_of", noted)
    assert wanfast("calibrate-magcache", "--model", "tiny", "--device", "cpu", "--set", str(folder)).exit_code == 2
    (plan, _) = seen
    assert plan.num_residuals(Mesh()) == 4 and plan.num_residuals(Mesh(cfg=2)) == 2
