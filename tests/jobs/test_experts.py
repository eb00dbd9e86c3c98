"""Tests experts in files of their own, from the command line to the video, its JSON and every key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wanfast as api
from tests import lora_files
from tests.conftest import Outcome
from tests.expert_forms import FORMS
from wanfast.runtime.config import EffectiveConfig, ModelsConfig, QuantizeConfig
from wanfast.runtime.engine import loading
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.jobs import doctor
from wanfast.runtime.store import curves, model_files
from wanfast.runtime.store.artifacts import key_of
from wanfast.runtime.store.expert_files import identified
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights.key_maps import rename

Wanfast = Callable[..., Outcome]
GOOD = (
    "generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--steps", "2", "--size",
    "64x64", "--frames", "5",
)  # fmt: skip
PAIR = ("--high-noise-expert", "high_noise.safetensors", "--low-noise-expert", "low_noise.gguf")


def tiny(expert: str) -> dict[str, Tensor]:
    """Returns the weights of an expert of the tiny model, under the original's names."""
    (file,) = (TINY / {"high_noise": "transformer", "low_noise": "transformer_2"}[expert]).glob("*.safetensors")
    return {rename("dit", "diffusers", key): tensor.float() for key, tensor in load_file(file).items()}


@pytest.fixture
def experts(workdir: Path) -> Path:
    """The tiny model's experts: plain, in fp8 by row, and in GGUF."""
    for expert in ("high_noise", "low_noise"):
        FORMS["bf16 with diffusion_model."](workdir / f"{expert}_plain.safetensors", tiny(expert))
    FORMS["fp8 of the distilled repository"](workdir / "high_noise.safetensors", tiny("high_noise"))
    FORMS["GGUF Q8_0"](workdir / "low_noise.gguf", tiny("low_noise"))
    return workdir


def made(wanfast: Wanfast, *words: str) -> dict[str, Any]:
    outcome = wanfast(*words, "--json")
    assert outcome.exit_code == 0, outcome.err
    return outcome.document


def test_the_same_weights_in_other_files_make_the_same_video(wanfast: Wanfast, experts: Path) -> None:
    plain = made(wanfast, *GOOD, "--output", "plain.mp4")
    given = ("--high-noise-expert", "high_noise_plain.safetensors", "--low-noise-expert", "low_noise_plain.safetensors")
    single = made(wanfast, *GOOD, *given, "--output", "single.mp4")
    one = made(wanfast, *GOOD, *given[2:], "--output", "one.mp4")
    folder = made(wanfast, *GOOD, "--low-noise-expert", str(TINY / "transformer_2"), "--output", "folder.mp4")
    assert {each["output_sha256"] for each in (plain, single, one, folder)} == {plain["output_sha256"]}
    assert plain["plan"]["experts"] == [] and [each["form"] for each in single["plan"]["experts"]] == ["BF16"] * 2
    assert single["weights"]["vae"] == plain["weights"]["vae"]
    assert single["weights"]["high_noise"] != plain["weights"]["high_noise"] == one["weights"]["high_noise"]


def test_a_video_its_json_and_the_run_again(wanfast: Wanfast, experts: Path) -> None:
    document = made(wanfast, *GOOD, *PAIR)
    assert document["effective"]["models"]["high_noise_expert"] == str(experts / "high_noise.safetensors")
    high, low = document["plan"]["experts"]
    assert (high["option"], high["form"]) == ("--high-noise-expert", "BF16 F8_E4M3, scaled by row")
    assert (low["path"], low["form"]) == (str(experts / "low_noise.gguf"), "GGUF BF16 F16 F32 Q8_0")
    assert [high["sha256"], low["sha256"]] == [document["weights"][name] for name in ("high_noise", "low_noise")]
    assert document["effective"]["models"]["expert_sha256"] == [high["sha256"], low["sha256"]]
    assert high["sha256"] == hashlib.sha256((experts / "high_noise.safetensors").read_bytes()).hexdigest()
    assert "gguf" in document["versions"]
    again = made(wanfast, "generate", "--from", "out.json", "--output", "again.mp4")
    assert again["output_sha256"] == document["output_sha256"]
    other = made(
        wanfast, "generate", "--from", "out.json", "--output", "other.mp4", "--low-noise-expert",
        "low_noise_plain.safetensors", "--dry-run",
    )  # fmt: skip
    assert [each["form"] for each in other["plan"]["experts"]] == [high["form"], "BF16"]
    assert not [note for note in other["plan"]["notes"] if "--from" in note]
    (experts / "high_noise.safetensors").write_bytes((experts / "high_noise_plain.safetensors").read_bytes())
    changed = wanfast("generate", "--from", "out.json", "--output", "changed.mp4", "--dry-run")
    assert (changed.exit_code, changed.err) == (
        2,
        "error: --from: an expert's file has changed since the earlier run: restore the file, or give experts "
        "by --high-noise-expert and --low-noise-expert\n",
    )


def test_a_renamed_file_is_the_same_expert(experts: Path) -> None:
    models = ModelsConfig(model="tiny", low_noise_expert="low_noise.gguf", artifacts_dir="artifacts")
    shutil.copy("low_noise.gguf", "second.gguf")
    second = dataclasses.replace(models, low_noise_expert=str(experts / "second.gguf"))
    assert identified(models).expert_sha256 == identified(second).expert_sha256


def test_each_line_of_a_list_has_its_own_experts(wanfast: Wanfast, experts: Path) -> None:
    (experts / "sets").mkdir()
    (experts / "low_noise.gguf").rename(experts / "sets" / "low_noise.gguf")
    lines: list[dict[str, Any]] = [{}, {"low_noise_expert": "low_noise.gguf"}, {"low_noise_expert": "no.gguf"}]
    Path("sets/jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, other, wrong = wanfast(*GOOD, "--jobs", "sets/jobs.jsonl", "--json").document["results"]
    assert wrong["exit_code"] == 2 and "sets/no.gguf: no such file" in wrong["error"]
    single = made(wanfast, *GOOD, "--low-noise-expert", "sets/low_noise.gguf", "--output", "one.mp4")
    assert single["output_sha256"] == other["output_sha256"] != plain["output_sha256"]


def test_numbers_of_8_bits_are_used_as_they_are(wanfast: Wanfast, experts: Path) -> None:
    FORMS["fp8 of 2025"](experts / "low_noise.safetensors", tiny("low_noise"))
    given = ("--high-noise-expert", "high_noise.safetensors", "--low-noise-expert", "low_noise.safetensors")
    scheme = ("--quantize", "fp8-rowwise")
    missing = wanfast(*GOOD, *given, *scheme)
    here = Path.cwd()
    assert missing.exit_code == 3 and f"--high-noise-expert {here}/high_noise.safetensors --low-noise" in missing.err
    assert wanfast("quantize", "--model", "tiny", "--scheme", "fp8-rowwise", *given).exit_code == 0
    stored = made(wanfast, *GOOD, *given, *scheme, "--output", "stored.mp4")
    fly = made(wanfast, *GOOD, *given, *scheme, "--quantize-on-the-fly", "--output", "fly.mp4")
    assert stored["output_sha256"] == fly["output_sha256"]
    for folder in stored["quantized"].values():
        errors = json.loads((here / "artifacts/quantized" / folder / "errors.json").read_text())
        assert errors["relative_error"] == 0.0
    assert wanfast(*GOOD, *scheme).exit_code == 3  # the model's own experts


def test_a_lora_on_such_experts(wanfast: Wanfast, experts: Path) -> None:
    lora_files.write(experts / "lora.safetensors", {"blocks.0.self_attn.q.diff": torch.ones(256, 256)})
    plain = made(wanfast, *GOOD, *PAIR, "--output", "plain.mp4")
    merged = made(wanfast, *GOOD, *PAIR, "--lora", "lora.safetensors", "--output", "merged.mp4")
    assert plain["output_sha256"] != merged["output_sha256"]
    refused = wanfast(*GOOD, *PAIR, "--lora", "lora.safetensors", "--quantize", "fp8-rowwise", "--dry-run")
    assert (
        refused.exit_code == 2
        and "quantizing after the merge would round them a second time: drop --quantize" in refused.err
    )
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (("wan_high.safetensors",), "--high-noise-expert {0} --low-noise-expert FILE"),
        (("wan_Low.gguf", "wan_High.gguf"), "--high-noise-expert {1} --low-noise-expert {0}"),
        (("HIGH Q4.gguf", "LOW Q4.gguf"), "--high-noise-expert '{0}' --low-noise-expert '{1}'"),
    ],
)
def test_a_file_after_model_is_refused_with_the_line_to_type(
    wanfast: Wanfast, workdir: Path, files: tuple[str, ...], line: str
) -> None:
    for file in files:
        (workdir / file).touch()
    outcome = wanfast("generate", "--model", files[0], "--image", "cat.png", "--prompt", "a cat", "--dry-run")
    wanted = line.format(*(workdir / file for file in files))
    assert outcome.exit_code == 2 and f"is a file: use `{wanted}`, and give --model the folder with" in outcome.err


def test_a_file_that_is_no_expert_after_model(wanfast: Wanfast, workdir: Path) -> None:
    outcome = wanfast("generate", "--model", "cat.png", "--image", "cat.png", "--prompt", "a cat", "--dry-run")
    assert outcome.exit_code == 2 and "is a file: give the folder that holds the whole model" in outcome.err


def test_a_folder_without_experts_is_enough_for_both_options(wanfast: Wanfast, experts: Path) -> None:
    shutil.copytree(TINY, "rest", ignore=shutil.ignore_patterns("transformer*"))
    given = ("--model", "rest", *GOOD[3:], *PAIR)
    whole, rest = (
        made(wanfast, "generate", *words, "--device", "cpu", "--output", f"{index}.mp4")
        for index, words in enumerate(((*GOOD[1:], *PAIR), given))
    )
    assert whole["output_sha256"] == rest["output_sha256"]
    outcome = wanfast("generate", *given[:-2], "--device", "cpu")
    assert outcome.exit_code == 2 and "rest has neither high_noise_model/ nor transformer/" in outcome.err
    shutil.rmtree("rest/vae")
    outcome = wanfast("generate", *given, "--device", "cpu")
    assert outcome.exit_code == 2 and "rest has neither Wan2.1_VAE.pth nor vae; give a Wan2.2 folder" in outcome.err


def test_the_published_model_without_its_experts(experts: Path) -> None:
    """The artifacts folder, or another program's cache, holds only the VAE and UMT5."""
    models = ModelsConfig(**dict(zip(("high_noise_expert", "low_noise_expert"), PAIR[1::2], strict=True)))
    folder = experts / "artifacts" / model_files.checkpoints("a14b", "diffusers")
    (folder / "vae").mkdir(parents=True)
    assert model_files.locate_for(models).root == folder
    assert not model_files.locate_for(ModelsConfig()).exists


def test_a_file_that_changes_after_the_plan_is_refused(experts: Path) -> None:
    models = identified(ModelsConfig(model="tiny", low_noise_expert="low_noise.gguf"))
    files = model_files.locate_for(models)
    assert loading.merges_of(files, models).keys() == {"high_noise", "low_noise"}
    FORMS["GGUF Q8_0"](experts / "low_noise.gguf", tiny("high_noise"))
    with pytest.raises(ConfigError, match="the file of an expert changed since the plan was made"):
        loading.merges_of(files, models)


def test_the_plan_on_a_terminal_and_the_doctor_know_the_experts(wanfast: Wanfast, experts: Path) -> None:
    out = wanfast(*GOOD, *PAIR, "--dry-run").out
    assert "experts   high_noise.safetensors, BF16 F8_E4M3, scaled by row (--high-noise-expert)" in out
    models = identified(ModelsConfig(model="tiny", quantize="fp8-rowwise", high_noise_expert=PAIR[1]))
    step = doctor._quantize_step(models)
    assert step is not None and f"--high-noise-expert {experts}/high_noise.safetensors" in step.command
    assert wanfast("doctor", "--model", "tiny", *PAIR).exit_code == 0


def test_an_expert_that_is_not_quantized_needs_no_file(experts: Path) -> None:
    with pytest.raises(ConfigError, match="--expert high and --low-noise-expert are for different experts"):
        QuantizeConfig(scheme="bf16", model="tiny", expert="high", low_noise_expert="low_noise.gguf")


@pytest.mark.parametrize("words", [("--high-noise-expert", ""), ("--low-noise-expert", " ")])
def test_an_empty_name_is_refused(wanfast: Wanfast, workdir: Path, words: tuple[str, str]) -> None:
    outcome = wanfast(*GOOD, *words, "--dry-run")
    assert (
        outcome.exit_code == 2
        and f"{words[0]} " in outcome.err
        and "has an empty value: give a .safetensors" in outcome.err
    )


def test_the_key_of_a_curve_holds_the_files(experts: Path) -> None:
    config = EffectiveConfig.of({"model": "tiny", "image": "none", "prompt": "none", "device": "cpu"}, A14B)
    found = {}
    for given in ({}, {"low_noise_expert": "low_noise.gguf"}, {"low_noise_expert": "low_noise_plain.safetensors"}):
        models = identified(dataclasses.replace(config.models, **given))
        of_run = dataclasses.replace(config, models=models)
        inputs = curves.curve_inputs(of_run, model_files.locate_for(models), "set")
        found[key_of(inputs)] = inputs
    assert len(found) == 3
    first, *_, last = found.values()
    assert set(curves.differences(last, first)) == {"experts"}
    assert "--low-noise-expert" in curves.calibrate_command(of_run, A14B)


def test_the_preset_curve_is_that_of_the_published_experts(wanfast: Wanfast, experts: Path) -> None:
    words = ("--image", "cat.png", "--prompt", "a cat", "--device", "cuda", "--magcache", "preset", "--dry-run")
    plain, other = (made(wanfast, "generate", *given, *words)["plan"]["notes"] for given in ((), PAIR[:2]))
    note = "--magcache preset: its curve was measured with the published experts; for a curve of this run, run "
    note += "`wanfast calibrate-magcache --high-noise-expert"
    assert [any(each.startswith(note) for each in notes) for notes in (plain, other)] == [False, True]
    outcome = wanfast(*GOOD, *PAIR, "--magcache", "preset", "--dry-run")
    assert outcome.exit_code == 2 and "no curve ships for these weights" in outcome.err


def test_a_handle_opens_experts(experts: Path, forked: None, wanfast: Wanfast) -> None:
    video: dict[str, Any] = {"image": "cat.png", "prompt": "a cat", "seed": 1, "steps": 2}
    options: dict[str, Any] = {"high_noise_expert": Path(PAIR[1]), "low_noise_expert": PAIR[3]}
    with api.open(model="tiny", device="cpu", size="64x64", frames=5, **options) as handle:
        first = handle.make(**video)
        with pytest.raises(ConfigError, match="low_noise_expert"):
            handle.make(**video, low_noise_expert="other.gguf")
    assert [each["option"] for each in first.plan["experts"]] == list(PAIR[::2])
    with pytest.raises(MissingArtifactError, match="is not quantized with fp8-rowwise yet"):
        api.open(model="tiny", device="cpu", quantize="fp8-rowwise", high_noise_expert=PAIR[1])


def test_a_config_of_an_earlier_version_names_no_experts() -> None:
    models = dataclasses.asdict(ModelsConfig(model="tiny"))
    kept = {name: value for name, value in models.items() if "expert" not in name}
    assert ModelsConfig(**kept) == ModelsConfig(**json.loads(json.dumps(models)))
