"""Tests distilled recipes and guidance that stops, from the command line to the video, its JSON and the run again."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lora_files
from tests.conftest import Outcome
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, of_command
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.processes.handle import Opened
from wanfast.runtime.store import model_files
from wanfast.runtime.store.lora_pairs import PAIRS, folder_of, words_of

Wanfast = Callable[..., Outcome]
VIDEO = ("--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--size", "64x64", "--frames", "5")
TINY = ("generate", "--model", "tiny", "--device", "cpu", *VIDEO)
PAIR = ("--lora-high-noise", "high_noise.safetensors", "--lora-low-noise", "low_noise.safetensors")


@pytest.fixture
def pair(workdir: Path) -> None:
    """Writes a LoRA for each expert of the tiny model, which changes one bias."""
    for name in ("high_noise", "low_noise"):
        lora_files.write(workdir / f"{name}.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)})


def planned(wanfast: Wanfast, *options: str) -> dict[str, Any]:
    outcome = wanfast(*TINY, *options, "--dry-run", "--json")
    assert outcome.exit_code == 0, outcome.err
    return outcome.document["plan"]


def refused(wanfast: Wanfast, *options: str) -> str:
    outcome = wanfast(*TINY, *options, "--dry-run")
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("recipe", "steps", "forwards"),
    [("lightning-4", (2, 2), 4), ("lightning-8", (3, 5), 8), ("hybrid", (15, 3), 33), ("rcm-4", (2, 2), 4),
     ("first-last-4", (2, 2), 4)],
)  # fmt: skip
def test_a_distilled_recipe_plans_its_steps(
    wanfast: Wanfast, pair: None, recipe: str, steps: tuple[int, int], forwards: int
) -> None:
    last = ("--last-image", "cat.png") if recipe == "first-last-4" else ()
    plan = planned(wanfast, "--recipe", recipe, *PAIR, *last)
    assert (plan["steps"]["high_noise"], plan["steps"]["low_noise"]) == steps
    assert plan["forwards"] == forwards and plan["overridden"] == {} and plan["shift"] is None
    assert plan["guidance"]["low_noise"] == 1 and plan["guidance"]["high_noise"] == (2 if recipe == "hybrid" else 1)


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "rcm-4", *PAIR),
        ("--sigmas", "1,0.95,0.9,0.5", "--switch-step", "1", "--guidance-gate", "0.5"),
        ("--steps", "8", "--guidance-gate", "0.4", "--magcache", "preset", "--magcache-interpolate"),
    ],
    ids=["rcm-4", "a list", "a gate and skips"],
)
def test_from_repeats_the_video(wanfast: Wanfast, pair: None, options: tuple[str, ...]) -> None:
    made = wanfast(*TINY, *options, "--json")
    assert made.exit_code == 0, made.err
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.exit_code == 0, again.err
    assert again.document["output_sha256"] == made.document["output_sha256"]
    assert again.document["effective"]["video"] == made.document["effective"]["video"]
    assert again.document["plan"]["timesteps"] == made.document["plan"]["timesteps"]


def test_each_of_the_options_changes_the_video(wanfast: Wanfast, pair: None, workdir: Path) -> None:
    listed = {"sigmas": "1,0.95,0.9,0.5"}
    lines = {
        "plain": {**listed},
        "switch": {**listed, "switch_step": 1},
        "gate": {**listed, "guidance_gate": 0.5},
        "other": {"sigmas": "1,0.95,0.9,0.4"},
        "euler": {**listed, "solver": "unipc-euler"},
        "rcm": {**listed, "solver": "rcm"},
        "recipe": {
            "recipe": "lightning-4",
            "lora_high_noise": "high_noise.safetensors",
            "lora_low_noise": "low_noise.safetensors",
        },
    }
    (workdir / "jobs.jsonl").write_text(
        "\n".join(json.dumps({"output": f"{name}.mp4", **line}) for name, line in lines.items())
    )
    outcome = wanfast(*TINY, "--jobs", "jobs.jsonl", "--json")
    assert outcome.exit_code == 0, outcome.err
    made = outcome.document["results"]
    assert len({each["output_sha256"] for each in made}) == len(lines)


def test_a_nearer_schedule_replaces_an_earlier_one(wanfast: Wanfast, pair: None, workdir: Path) -> None:
    """A line of a list overrides the command line, and the command line the earlier run."""
    lines = ({"recipe": "lightning-4"}, {"sigmas": "1,0.5"}, {}, {"recipe": "lightning-4", "steps": 3})
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast(*TINY, *PAIR, "--steps", "6", "--jobs", "jobs.jsonl", "--dry-run", "--json")
    *good, bad = outcome.document["results"]
    assert [sum(each["plan"]["steps"].values()) for each in good] == [4, 2, 6]
    assert bad["error"].startswith("--recipe lightning-4 and --steps exclude each other")
    Path("listed.json").write_text(json.dumps(good[1] | {"weights": None}))
    Path("recipe.json").write_text(json.dumps(good[0] | {"weights": None}))
    Path("steps.json").write_text(json.dumps(good[2] | {"weights": None}))

    def again(file: str, *options: str) -> dict[str, Any]:
        outcome = wanfast("generate", "--from", file, *options, "--dry-run", "--json")
        assert outcome.exit_code == 0, outcome.err
        return outcome.document["plan"]

    assert sum(again("listed.json", "--steps", "7")["steps"].values()) == 7
    assert again("listed.json", "--sigmas", "0.9,0.8,0.7", "--switch-step", "3")["steps"]["high_noise"] == 3
    assert again("steps.json", "--recipe", "lightning-4")["overridden"] == {}
    assert again("steps.json", "--sigmas", "0.9")["sigmas"] == [0.9]
    other = planned(wanfast, "--recipe", "hybrid", *PAIR, "--sigmas", "0.95,0.5")
    assert other["overridden"] == {"sigmas": "0.95,0.5"} and other["steps"] == {"high_noise": 1, "low_noise": 1}
    kept = again("recipe.json", "--solver", "rcm")
    assert kept["overridden"] == {"solver": "rcm"} and kept["sigmas"] == [1, 0.9375, 0.833333333, 0.625]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sigmas", "1,0.5", "--steps", "2"), "--steps 2 and --sigmas exclude each other"),
        (("--sigmas", "1,0.5", "--shift", "3"), "--shift 3 and --sigmas exclude each other"),
        (
            ("--switch-step", "1", "--steps", "2"),
            "--switch-step 1 is only for the list of --sigmas: drop --switch-step",
        ),
        (
            ("--switch-step", "1", "--shift", "3"),
            "--switch-step 1 is only for the list of --sigmas: drop --switch-step",
        ),
        (("--sigmas", "1,0.5", "--switch-step", "3"), "--switch-step 3: --sigmas has 2 steps: use 0 to 2"),
        (("--sigmas", "1,0.5,0"), "--sigmas 1,0.5,0: leave out the 0 at the end"),
        (("--sigmas", "1,1"), "--sigmas 1,1: each noise level must be less than the one before, by 0.000001 or more"),
        (("--sigmas", "0.9,0.8999999"), "--sigmas 0.9,0.8999999: each noise level must be less than the one before"),
        (("--sigmas", "1.1,1"), "--sigmas 1.1,1: a noise level is 0.001 to 1"),
        (("--sigmas", "1,1e-9"), "--sigmas 1,1e-9: a noise level is 0.001 to 1"),
        (("--sigmas", "nan,0.5"), "--sigmas nan,0.5: a noise level is 0.001 to 1"),
        (("--sigmas", "1,x"), "--sigmas 1,x: write numbers separated by commas"),
        (("--guidance-gate", "0"), "--guidance-gate 0.0: use a share over 0, up to 1"),
        (("--guidance-gate", "1.5"), "--guidance-gate 1.5: use a share over 0, up to 1"),
        (
            ("--guidance-gate", "0.5", "--guidance-high-noise", "1", "--guidance-low-noise", "1"),
            "--guidance-gate 0.5 needs guidance, but both guidance scales are 1: drop --guidance-gate, or",
        ),
        (("--recipe", "hybrid", "--shift", "3"), "--recipe hybrid and --shift exclude each other"),
        (
            ("--recipe", "lightning-4", *PAIR, "--magcache", "E012K2R20"),
            "--magcache preset: its curve (40 steps with unipc at shift 5) does not fit the steps of --recipe",
        ),
        (("--sigmas", "1,0.5", "--magcache", "preset"), "--magcache preset: its curve (40 steps with unipc at"),
        (
            ("--recipe", "hybrid", *PAIR, "--magcache", "E012K2R20", "--magcache-rule", "low-noise-only"),
            "--magcache-rule low-noise-only: no step can be skipped, because the steps of the low-noise",
        ),
        (
            ("--recipe", "hybrid", *PAIR, "--magcache", "artifact"),
            "--magcache artifact and --recipe hybrid exclude each other",
        ),
        (
            ("--recipe", "hybrid", *PAIR, "--sigmas", "1,0.5", "--magcache", "artifact"),
            "--magcache artifact and --sigmas exclude each other",
        ),
        (
            ("--recipe", "hybrid", *PAIR, "--magcache", "preset", "--magcache-interpolate"),
            "--magcache-interpolate and --recipe hybrid exclude each other",
        ),
    ],
)
def test_refusals_name_the_option_and_the_fix(
    wanfast: Wanfast, pair: None, options: tuple[str, ...], message: str
) -> None:
    assert refused(wanfast, *options).startswith(message)


def test_only_the_base_part_of_the_hybrid_is_skipped(wanfast: Wanfast, pair: None) -> None:
    only_low = PAIR[2:]
    outcome = wanfast(*TINY, "--recipe", "hybrid", *only_low, "--magcache", "E012K2R20", "--dry-run")
    assert "the last 3 steps are never skipped, because the curve has no ratios for them" in outcome.out
    assert "no LoRA" not in outcome.err  # no skipped expert has one
    plan = planned(wanfast, "--recipe", "hybrid", *only_low, "--magcache", "E012K2R20")["magcache"]
    whole = planned(wanfast, "--magcache", "E012K2R20", "--magcache-rule", "both-experts")["magcache"]
    assert plan["skips_prompt"] == [*whole["skips_prompt"][:15], False, False, False]
    assert sum(plan["skips_prompt"]) == 8 and plan["always_computed"] == [15, 16, 17]
    assert "no LoRA" in wanfast(*TINY, "--recipe", "hybrid", *PAIR, "--magcache", "E012K2R20", "--dry-run").err


def test_weights_without_a_curve_are_told_to_skip_nothing(wanfast: Wanfast, pair: None, small_model: Path) -> None:
    """A curve that is calibrated for these weights could not be used with a list."""
    video = ("--model", str(small_model), *VIDEO, "--device", "cpu", "--sigmas", "1,0.5", "--magcache", "preset")
    outcome = wanfast("generate", *video, "--dry-run")
    assert outcome.err == "error: --magcache preset: no curve ships for these weights (small): drop --magcache\n"


def test_the_plan_states_what_a_gate_saves_and_how_it_meets_magcache(wanfast: Wanfast) -> None:
    skips = ("--magcache", "E012K2R20", "--magcache-rule", "both-experts")
    outcome = wanfast(*TINY, "--guidance-gate", "0.5", *skips, "--dry-run")
    gate = "the negative prompt runs in the first 8 high-noise and the first 12 low-noise steps (gate 0.5): 60 of 80"
    assert f"{gate} forwards" in outcome.out
    assert "an expert's last step with guidance and its first step without guidance are never skipped" in outcome.out
    plan = planned(wanfast, "--guidance-gate", "0.5", *skips)
    assert plan["forwards"] == 60 and plan["guided_steps"] == {"high_noise": 8, "low_noise": 12}
    at_gate = plan["magcache"]["always_computed"]
    assert at_gate == [7, 8, 26, 27]
    of_branches = [plan["magcache"][name] for name in ("skips_prompt", "skips_negative_prompt")]
    assert not any(skips[step] for skips in of_branches for step in at_gate)


def test_distilled_weights_are_required_with_the_line_to_type(wanfast: Wanfast, pair: None, workdir: Path) -> None:
    a14b = ("generate", "--device", "cpu", *VIDEO, "--dry-run", "--recipe")
    name, artifacts = "lightning-seko-v1", workdir / "artifacts"
    first = f"--recipe lightning-4 needs distilled weights of both experts: run `wanfast download --lora {name}`, then"
    assert wanfast(*a14b, "lightning-4").err == f"error: {first} add `{words_of(name, artifacts)}`\n"
    for file in PAIRS[name].files.values():
        (folder_of(name, artifacts) / file).parent.mkdir(parents=True, exist_ok=True)
        (folder_of(name, artifacts) / file).touch()
    low = f"add `{words_of(name, artifacts, ('low_noise',))}`"
    hybrid = f"error: --recipe hybrid needs distilled weights of the low-noise expert: {low}\n"
    assert wanfast(*a14b, "hybrid").err == hybrid
    assert wanfast(*a14b, "lightning-8", *PAIR[:2]).err.endswith(f"of the low-noise expert: {low}\n")
    own = ("--model", str(lora_files.tiny_without_loras(workdir)), "--recipe")
    assert refused(wanfast, *own, "rcm-4", *PAIR[2:]) == (
        "--recipe rcm-4 needs distilled weights of the high-noise expert: add `--lora-high-noise FILE`, or "
        "`--high-noise-expert FILE`"
    )
    of_tiny = (
        "needs distilled weights of both experts: add `--lora-high-noise FILE --lora-low-noise FILE`, or "
        "`--high-noise-expert FILE --low-noise-expert FILE`"
    )
    assert refused(wanfast, *own, "lightning-4") == f"--recipe lightning-4 {of_tiny}"
    Path("both.safetensors").write_bytes(Path("high_noise.safetensors").read_bytes())
    assert planned(wanfast, *own, "lightning-4", "--lora", "both.safetensors")["forwards"] == 4
    experts = [
        f"--{half}-noise-expert={model_files.TINY / folder}"
        for half, folder in (("high", "transformer"), ("low", "transformer_2"))
    ]
    assert planned(wanfast, *own, "lightning-4", *experts)["forwards"] == 4
    assert "of the low-noise expert" in refused(wanfast, *own, "lightning-4", experts[0])


def test_a_model_may_bring_the_loras_of_a_recipe(wanfast: Wanfast, pair: None, workdir: Path) -> None:
    own = lora_files.tiny_without_loras(workdir)
    for name in ("high_noise", "low_noise"):
        (own / "loras/lightning-4").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{name}.safetensors", own / "loras/lightning-4")
    line = ("generate", "--model", "own", "--device", "cpu", *VIDEO, "--recipe")
    made = wanfast(*line, "lightning-4", "--json").document
    given = wanfast(*TINY, "--recipe", "lightning-4", *PAIR, "--output", "given.mp4", "--json").document
    assert made["output_sha256"] == given["output_sha256"]
    assert made["effective"]["models"]["lora_sha256"] == given["effective"]["models"]["lora_sha256"]
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json").document
    assert again["output_sha256"] == made["output_sha256"]
    named = wanfast(*line, "lightning-4", *PAIR[:2], "--dry-run", "--json").document["effective"]["models"]
    assert named["lora_high_noise"] == [str(workdir / "high_noise.safetensors")]
    assert named["lora_low_noise"] == [str(own / "loras/lightning-4/low_noise.safetensors")]
    (own / "loras/lightning-4/low_noise.safetensors").unlink()
    assert "distilled weights of the low-noise expert" in wanfast(*line, "lightning-4", "--dry-run").err
    assert "distilled weights of the low-noise expert" in wanfast(*line, "hybrid", "--dry-run").err


def test_a_handle_takes_the_recipe_and_the_weights_by_either_call(pair: None, workdir: Path) -> None:
    """`make` may name the LoRAs, so that `open` does not miss them."""
    both = {"lora_high_noise": "high_noise.safetensors", "lora_low_noise": "low_noise.safetensors"}
    own = str(lora_files.tiny_without_loras(workdir))
    opened = Opened.of({"model": own, "device": "cpu", "recipe": "lightning-4", "num_gpus": 2})
    assert (opened.placed.mesh.cfg, opened.placed.mesh.ulysses) == (1, 2)  # nothing is guided
    video = {"image": "cat.png", "prompt": "a cat"}
    assert opened.plan(video | both).num_forwards == 4
    assert opened.plan(video | both | {"sigmas": "1,0.5"}).num_forwards == 2
    with pytest.raises(ConfigError, match="--recipe lightning-4 needs distilled weights of both experts"):
        opened.plan(video)
    with pytest.raises(ConfigError, match="--recipe lightning-4 and --steps exclude each other"):
        opened.plan(video | both | {"steps": 3})


def test_a_video_of_a_handle_may_have_distilled_weights_of_its_own(pair: None, workdir: Path) -> None:
    """A handle offers the recipes that it can make, by the LoRAs of `open` or of the model; `make` may name others."""
    video = {"image": "cat.png", "prompt": "a cat"}
    both = {"lora_high_noise": ("high_noise.safetensors",), "lora_low_noise": ("low_noise.safetensors",)}

    def offered(opened: Opened) -> list[str]:
        return [name for name in RECIPES if opened.has_models_of(name)]

    def own_of(opened: Opened, recipe: str, **options: Any) -> list[tuple[str, ...]]:
        models = opened.plan({**video, "recipe": recipe, **options}).config.models
        return [models.lora_high_noise, models.lora_low_noise]

    folder = model_files.TINY / "loras/lightning-4"
    shipped = [(str(folder / f"{expert}.safetensors"),) for expert in ("high_noise", "low_noise")]
    for recipe in (None, "lightning-4"):
        opened = Opened.of({"model": "tiny", "device": "cpu", "recipe": recipe})
        assert offered(opened) == ["lightning-4", "hybrid"]
        assert own_of(opened, "lightning-4") == shipped and own_of(opened, "hybrid") == [(), shipped[1]]
        assert opened.plan({**video, "recipe": "rcm-4", **both}).num_forwards == 4
        with pytest.raises(ConfigError, match=r"--recipe rcm-4: .* fits the loaded models \(lightning-4, hybrid\)$"):
            opened.plan({**video, "recipe": "rcm-4"})
    without = Opened.of({"model": str(lora_files.tiny_without_loras(workdir)), "device": "cpu"})
    assert offered(without) == []
    given = [tuple(str(workdir / each) for each in both[name]) for name in both]
    assert own_of(without, "lightning-4", **both) == given
    assert own_of(without, "hybrid", lora_low_noise=both["lora_low_noise"]) == [(), given[1]]


def test_the_hybrid_takes_the_low_noise_lora_for_four_steps(wanfast: Wanfast, pair: None, workdir: Path) -> None:
    own = lora_files.tiny_without_loras(workdir)
    for recipe, halves in {"lightning-4": ("high_noise", "low_noise"), "hybrid": ("low_noise",)}.items():
        (own / "loras" / recipe).mkdir(parents=True)
        for half in halves:
            shutil.copy(f"{half}.safetensors", own / "loras" / recipe)
        line = ("generate", "--model", "own", "--device", "cpu", *VIDEO, "--recipe", "hybrid", "--dry-run", "--json")
        models = wanfast(*line).document["effective"]["models"]
        assert models["lora_low_noise"] == [str(own / f"loras/{recipe}/low_noise.safetensors")]
        assert models["lora_high_noise"] == []


def test_from_finds_the_loras_of_a_model_that_lies_elsewhere(wanfast: Wanfast, workdir: Path) -> None:
    """The package of the tiny model may be installed in another folder, or on another machine."""
    made = wanfast(*TINY, "--recipe", "lightning-4", "--dry-run", "--json")
    elsewhere = json.dumps(made.document | {"weights": None}).replace(str(model_files.TINY), "/elsewhere")
    assert "/elsewhere/loras" in elsewhere
    (workdir / "one.json").write_text(elsewhere)
    again = wanfast("generate", "--from", "one.json", "--dry-run", "--json")
    assert again.exit_code == 0, again.err
    assert again.document["effective"]["models"] == made.document["effective"]["models"]
    digests = made.document["effective"]["models"]["lora_sha256"]
    (workdir / "two.json").write_text(elsewhere.replace(digests[0], "0" * 64))
    assert "--from: a LoRA file has changed since the earlier run" in wanfast("generate", "--from", "two.json").err


def test_curves_are_measured_without_distilled_weights() -> None:
    with pytest.raises(
        ConfigError, match="--recipe hybrid: this recipe uses distilled weights, but a curve is measured without them"
    ):
        of_command({"recipe": "hybrid"}, "calibrate-magcache")


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.distilled])
def test_a_sidecar_holds_the_schedule(recipe: str) -> None:
    config = EffectiveConfig.of({**NO_VIDEO, "recipe": recipe}, A14B)
    assert (config.video.steps, config.video.shift) == (None, None)
    assert config.video.num_steps == len(config.video.levels or ())
    assert EffectiveConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert EffectiveConfig.of(config.options(), A14B).video == config.video


def test_sidecars_from_before_have_no_list_and_no_gate() -> None:
    document = EffectiveConfig.of({**NO_VIDEO, "steps": 6}, A14B).to_json()
    for name in ("sigmas", "switch_step", "guidance_gate"):
        del document["video"][name]
    video = EffectiveConfig.from_json(document).video
    assert (video.sigmas, video.switch_step, video.guidance_gate, video.num_steps) == (None, None, 1.0, 6)
    with pytest.raises(ConfigError, match="--steps is missing: give --steps, or give noise levels by --sigmas"):
        EffectiveConfig.from_json({**document, "video": document["video"] | {"steps": None}})


def test_ranks_regroup_behind_a_gate_and_again_with_from(wanfast: Wanfast, pair: None) -> None:
    options = ("--steps", "4", "--guidance-gate", "0.5", "--num-gpus", "2")
    shown = wanfast(*TINY, *options, "--dry-run").out
    assert "cfg 2 x ulysses 1 a video; ulysses 2 in steps without guidance" in shown
    made = wanfast(*TINY, *options, "--json")
    assert made.exit_code == 0, made.err
    assert json.loads(Path("out.json").read_text())["plan"]["unguided_mesh"] == {"replica": 1, "cfg": 1, "ulysses": 2}
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.exit_code == 0, again.err
    assert again.document["plan"]["unguided_mesh"] == made.document["plan"]["unguided_mesh"]
    assert again.document["output_sha256"] == made.document["output_sha256"]
    ungated = wanfast("generate", "--from", "out.json", "--output", "whole.mp4", "--guidance-gate", "1", "--dry-run")
    assert "cfg 2 x ulysses 1 a video" in ungated.out and "in steps without guidance" not in ungated.out


def test_a_note_says_that_other_loras_replace_those_of_the_model(wanfast: Wanfast, workdir: Path) -> None:
    """The options that the note shows silence it, and so does naming no LoRA."""
    lora_files.write(workdir / "style.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)})
    style = ("--recipe", "lightning-4", "--lora", "style.safetensors")
    (note,) = notes_on_loras(planned(wanfast, *style))
    both = shlex.split(note.partition("to use these too, add ")[2])
    assert [*both[::2]] == ["--lora-high-noise", "--lora-low-noise"]
    for options, loras in ((("--recipe", "lightning-4"), 2), ((*style, *both), 3)):
        plan = planned(wanfast, *options)
        assert (len(plan["loras"]), notes_on_loras(plan)) == (loras, [])


def notes_on_loras(plan: dict[str, Any]) -> list[str]:
    return [note for note in plan["notes"] if "LoRA" in note]
