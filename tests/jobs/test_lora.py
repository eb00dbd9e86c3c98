"""Tests LoRAs from the command line, a list, an earlier run and the API to the video, its JSON and every key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wanfast as api
from tests import lora_files
from tests.conftest import Outcome
from tests.lora_files import low_rank, of_blocks
from wanfast.runtime.config import EffectiveConfig, ModelsConfig
from wanfast.runtime.config.models import parse_lora
from wanfast.runtime.engine import loading
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.jobs import doctor
from wanfast.runtime.store import curves, model_files
from wanfast.runtime.store.artifacts import key_of
from wanfast.runtime.store.expert_files import identified

Wanfast = Callable[..., Outcome]
GOOD = (
    "generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--steps", "2", "--size",
    "64x64", "--frames", "5",
)  # fmt: skip


@pytest.fixture
def loras(workdir: Path) -> tuple[str, str]:
    """Two files for the tiny model, which change every linear of its blocks."""
    spec = model_files.locate("tiny", "artifacts").spec.dit
    wanted = of_blocks(spec)
    torch.manual_seed(5)
    for name in ("one", "two"):
        tensors, _ = low_rank(wanted, {module: f"diffusion_model.{module}" for module in wanted}, alpha=0.3)
        tensors["blocks.0.cross_attn.k_img.alpha"] = torch.ones(())
        lora_files.write(workdir / f"{name}.safetensors", tensors)
    return "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0), ("a@0.5", "a", 0.5), ("a@-1", "a", -1.0), ("a@2@.5", "a@2", 0.5),
        ("me@home/a", "me@home/a", 1.0), ("a@x", "a@x", 1.0), ("a@1e-1", "a", 0.1), ("@3", "@3", 1.0),
    ],
)  # fmt: skip
def test_the_last_at_sign_before_a_number_gives_the_strength(text: str, path: str, strength: float) -> None:
    assert parse_lora(text) == (path, strength)


def test_a_video_its_json_and_the_run_again(wanfast: Wanfast, loras: tuple[str, str], workdir: Path) -> None:
    one, two = loras
    given = ("--lora", f"{one}@0.5", "--lora", two, "--lora-low-noise", f"{two}@-0.25")
    plain = wanfast(*GOOD, "--output", "plain.mp4", "--json").document
    made = wanfast(*GOOD, *given, "--json")
    assert made.exit_code == 0, made.err
    document = made.document
    assert document["output_sha256"] != plain["output_sha256"]
    assert document["effective"]["models"]["lora"] == [str(workdir / one) + "@0.5", str(workdir / two)]
    assert [(each["option"], each["strength"]) for each in document["plan"]["loras"]] == [
        ("--lora", 0.5), ("--lora", 1.0), ("--lora-low-noise", -0.25),
    ]  # fmt: skip
    assert len({each["sha256"] for each in document["plan"]["loras"]}) == 2
    note = (
        "the tensors for Wan2.1's CLIP image features (1 in all) are dropped, because this model has no layers for "
        "such features"
    )
    assert f"--lora {one}: {note}" in document["plan"]["notes"] and plain["plan"]["loras"] == []
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json").document
    assert again["output_sha256"] == document["output_sha256"]
    other = wanfast("generate", "--from", "out.json", "--output", "other.mp4", "--lora", one, "--dry-run", "--json")
    assert [each["option"] for each in other.document["plan"]["loras"]] == ["--lora", "--lora-low-noise"]
    (workdir / two).write_bytes((workdir / one).read_bytes())
    changed = wanfast("generate", "--from", "out.json", "--output", "changed.mp4", "--dry-run")
    assert (changed.exit_code, changed.err) == (
        2,
        "error: --from: a LoRA file has changed since the earlier run: restore the file, or give LoRAs by --lora\n",
    )


def test_each_line_of_a_list_has_its_own_loras_and_the_models_are_loaded_once(
    wanfast: Wanfast, loras: tuple[str, str], workdir: Path
) -> None:
    one, two = loras
    (workdir / "sets").mkdir()
    (workdir / one).rename(workdir / "sets" / one)
    lines: list[dict[str, Any]] = [{}, {"lora": [f"{one}@2", f"../{two}"]}, {"lora_low_noise": one}]
    Path("sets/jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = wanfast(*GOOD, "--jobs", "sets/jobs.jsonl", "--json").document["results"]
    assert ["vae" in result["loading"] for result in results] == [True, False, False]
    assert all({"high_noise", "low_noise"} <= result["loading"].keys() for result in results)
    alone = [(), ("--lora", f"sets/{one}@2", "--lora", two), ("--lora-low-noise", f"sets/{one}")]
    for index, (words, result) in enumerate(zip(alone, results, strict=True)):
        single = wanfast(*GOOD, *words, "--output", f"{index}.mp4", "--json").document
        assert single["output_sha256"] == result["output_sha256"]
    assert len({result["output_sha256"] for result in results}) == 3


def test_a_lora_that_does_not_fit_closes_no_list(wanfast: Wanfast, loras: tuple[str, str], workdir: Path) -> None:
    """A header that does not fit costs no loaded models. A NaN is found only while weights are overwritten."""
    lora_files.write(workdir / "bad.safetensors", {"blocks.0.self_attn.q.diff": torch.full((256, 256), torch.nan)})
    lora_files.write(workdir / "other.safetensors", {"blocks.99.self_attn.q.diff": torch.ones(2, 2)})
    lines = [{}, {"lora": "other.safetensors"}, {"lora": loras[0]}, {"lora": "bad.safetensors"}, {"lora": loras[1]}]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--json")
    results = outcome.document["results"]
    assert [result.get("exit_code", 0) for result in results] == [0, 4, 0, 4, 0]
    assert "'blocks.99.self_attn.q.diff' matches nothing" in results[1]["error"]
    assert "bad.safetensors: tensor 'blocks.0.self_attn.q.diff' holds NaN" in results[3]["error"]
    assert ["vae" in result["loading"] for result in results[::2]] == [True, False, True]
    for lora, result in zip(loras, results[2::2], strict=True):
        single = wanfast(*GOOD, "--lora", lora, "--output", f"{lora}.mp4", "--json").document
        assert single["output_sha256"] == result["output_sha256"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--lora", "none.safetensors"), 2, "--lora {here}/none.safetensors: no such file: check the path"),
        (("--lora", ""), 2, "--lora : has an empty value: give a .safetensors file"),
        (("--lora-high-noise", "a@101"), 2, "--lora-high-noise a@101: use a strength from -100 to 100"),
        (("--lora", "out/motion.safetensors@101"), 2, "--lora out/motion.safetensors@101: use a strength from"),
        (("--lora", f"{'a' * 90}@101"), 2, f"--lora {'a' * 57}...: use a strength from"),
        (("--lora", "cat.png"), 4, "--lora {here}/cat.png: "),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_starts(
    wanfast: Wanfast, workdir: Path, words: tuple[str, str], code: int, message: str
) -> None:
    outcome = wanfast(*GOOD, *words, "--dry-run")
    assert outcome.exit_code == code and outcome.err.startswith(f"error: {message.format(here=workdir)}")
    assert outcome.err.count("\n") == 1


def test_a_file_that_changes_after_the_plan_is_refused(loras: tuple[str, str], workdir: Path) -> None:
    files = model_files.locate("tiny", str(workdir / "artifacts"))
    models = identified(ModelsConfig(model="tiny", lora=(loras[0],), artifacts_dir=str(workdir / "artifacts")))
    assert loading.merges_of(files, models).keys() == {"high_noise", "low_noise"}
    (workdir / loras[0]).write_bytes((workdir / loras[1]).read_bytes())
    with pytest.raises(ConfigError, match="the file of a LoRA changed since the plan was made"):
        loading.merges_of(files, models)


def test_the_plan_on_a_terminal_and_the_doctor_know_the_loras(wanfast: Wanfast, loras: tuple[str, str]) -> None:
    given = ("--lora", f"{loras[0]}@0.5")
    assert f"LoRA      {loras[0]}, strength 0.5 (--lora)" in wanfast(*GOOD, *given, "--dry-run").out
    models = identified(ModelsConfig(model="tiny", lora=(given[1],), quantize="int8-dynamic"))
    step = doctor._quantize_step(models)
    assert step is not None and f"--lora {Path(loras[0]).absolute()}@0.5" in step.command
    assert wanfast("doctor", "--model", "tiny", *given).exit_code == 0


def test_a_list_line_of_a_wrong_type(wanfast: Wanfast, workdir: Path) -> None:
    Path("jobs.jsonl").write_text('{"lora": 3}\n{"lora": [null]}\n{}\n')
    first, second, good = wanfast(*GOOD, "--jobs", "jobs.jsonl", "--dry-run", "--json").document["results"]
    assert all("a text or a list of texts is needed" in each["error"] for each in (first, second)) and "plan" in good


def test_no_video_overwrites_a_lora(wanfast: Wanfast, loras: tuple[str, str], workdir: Path) -> None:
    (workdir / loras[0]).rename(workdir / "lora.mp4")
    outcome = wanfast(*GOOD, "--lora", "lora.mp4", "--output", "lora.mp4", "--overwrite")
    assert outcome.exit_code == 2 and "would overwrite a file that a video is made from" in outcome.err


def test_an_expert_that_is_not_quantized_needs_no_lora(loras: tuple[str, str]) -> None:
    from wanfast.runtime.config import QuantizeConfig

    with pytest.raises(ConfigError, match="--expert high and --lora-low-noise are for different experts"):
        QuantizeConfig(scheme="bf16", model="tiny", expert="high", lora_low_noise=(loras[0],))


def test_quantize_stores_what_generate_uses(wanfast: Wanfast, loras: tuple[str, str]) -> None:
    given = ("--lora", f"{loras[0]}@0.5", "--lora-low-noise", loras[1])
    scheme = ("--quantize", "int8-dynamic")
    missing = wanfast(*GOOD, *given, *scheme)
    assert missing.exit_code == 3 and f"--lora {Path(loras[0]).absolute()}@0.5 --lora-low-noise " in missing.err
    assert wanfast("quantize", "--model", "tiny", "--scheme", "int8-dynamic", *given).exit_code == 0
    stored, fly = (
        wanfast(*GOOD, *given, *scheme, *words, "--output", f"{len(words)}.mp4", "--json").document
        for words in ((), ("--quantize-on-the-fly",))
    )
    assert stored["output_sha256"] == fly["output_sha256"]
    assert wanfast(*GOOD, *scheme, "--dry-run").exit_code == 0
    assert wanfast(*GOOD, *scheme).exit_code == 3  # without the LoRAs
    options: dict[str, Any] = {"lora": given[1], "lora_low_noise": given[3], "quantize": "int8-dynamic"}
    with api.open(model="tiny", device="cpu", size="64x64", frames=5, **options) as handle:
        with pytest.raises(MissingArtifactError, match="is not quantized with int8-dynamic yet"):
            handle.make(image="cat.png", prompt="a cat", lora=[])
        handle.make(image="cat.png", prompt="a cat", seed=1, steps=2)


def test_the_key_of_a_curve_holds_file_and_strength(loras: tuple[str, str], workdir: Path) -> None:
    files = model_files.locate("tiny", str(workdir / "artifacts"))
    config = EffectiveConfig.of({"model": "tiny", "image": "none", "prompt": "none", "device": "cpu"}, A14B)
    one, two = loras
    found = {}
    for given in ({}, {"lora": (one,)}, {"lora": (f"{one}@2",)}, {"lora": (two,)}, {"lora_low_noise": (one,)}):
        models = identified(dataclasses.replace(config.models, **given))
        inputs = curves.curve_inputs(dataclasses.replace(config, models=models), files, "set")
        found[key_of(inputs)] = inputs
    assert len(found) == 5
    without, with_one, *_ = found.values()
    assert set(curves.differences(with_one, without)) == set(curves.differences(without, with_one)) == {"loras"}
    assert "--lora" in curves.calibrate_command(dataclasses.replace(config, models=models), files.spec)
    older = {name: value for name, value in without.items() if name != "loras"}
    assert curves.differences(older, without) == {}


def test_a_handle_changes_loras_from_video_to_video(loras: tuple[str, str], workdir: Path, forked: None) -> None:
    video: dict[str, Any] = {"image": "cat.png", "prompt": "a cat", "seed": 1, "steps": 2}
    one, two = loras
    with api.open(model="tiny", device="cpu", size="64x64", frames=5, lora=one) as handle:
        made = [handle.make(**video, **given) for given in ({}, {"lora": [Path(two)]}, {"lora": []}, {"lora": one})]
    first, second, plain, again = (each.frames for each in made)
    assert (first == again).all() and (first != second).any() and (plain != first).any() and (plain != second).any()
    assert [each["file"] for each in made[1].plan["loras"]] == [str(workdir / two)]


def test_a_config_of_an_earlier_version_has_no_loras() -> None:
    models = dataclasses.asdict(ModelsConfig(model="tiny"))
    kept = {name: value for name, value in models.items() if not name.startswith("lora")}
    assert ModelsConfig(**kept) == ModelsConfig(**json.loads(json.dumps(models)))
