"""Tests models that make videos from text alone, through each command, the Python API and the server."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import wanfast as api
from tests.compiling import compiler
from tests.conftest import Machine, Outcome
from tests.engine.test_rank_groups import with_options
from tests.server.running import STAR, data_url, running
from tests.small_model import TEXT_SPEC, plan_small_model
from wanfast.magcache_calib.clips import read_set, shipped_set
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.model_spec import A14B, T2V_A14B
from wanfast.runtime.facts.shapes import geometry_of, largest_geometry
from wanfast.runtime.jobs import warmup
from wanfast.runtime.machine import gpus
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.memory_fit import fit
from wanfast.runtime.planning.next_step import example, next_step
from wanfast.runtime.sampling.magcache import MagCacheSettings, plan_skips
from wanfast.runtime.store.curves import published_curve, steps_of
from wanfast.runtime.store.model_files import checkpoints

Wanfast = Callable[..., Outcome]
SHAPE = ("--device", "cpu", "--size", "48x32", "--frames", "5", "--steps", "4")
PLANNED = ("generate", "--model", "t2v-a14b", "--prompt", "a cat", "--device", "cpu", "--dry-run")


@pytest.fixture
def made(wanfast: Wanfast, small_text_model: Path) -> Callable[..., Outcome]:
    """Returns a function that makes a small video from text."""
    given = ("generate", "--model", str(small_text_model), "--seed", "1", *SHAPE, "--json")
    return lambda *options, prompt="a cat": wanfast(*given, "--prompt", prompt, *options)


def test_the_facts_are_the_publishers() -> None:
    """They are those of Wan-Video/Wan2.2, wan/configs/wan_t2v_A14B.py."""
    spec = T2V_A14B
    assert (spec.dit.in_channels, spec.shift, spec.boundary, spec.steps) == (16, 12.0, 0.875, 40)
    assert (spec.guidance_low_noise, spec.guidance_high_noise) == (3.0, 4.0)
    assert not spec.takes_images and A14B.takes_images and spec.negative_prompt == A14B.negative_prompt
    products, small = memory.dit_parameters(spec.dit)
    assert 4 * (products + small) == 57_153_966_336  # the published index's total_size


def test_the_plan_has_the_models_own_values(wanfast: Wanfast) -> None:
    outcome = wanfast(*PLANNED, "--json")
    assert outcome.exit_code == 0, outcome.err
    plan = outcome.document["plan"]
    assert plan["model"] == "Wan2.2-T2V-A14B" and plan["images"] == {}
    assert (plan["width"], plan["height"], plan["tokens"]) == (1280, 720, 75_600)
    assert plan["steps"] == {"high_noise": 26, "low_noise": 14} and plan["shift"] == 12.0
    assert plan["guidance"] == {"high_noise": 4.0, "low_noise": 3.0}
    small = wanfast(*PLANNED, "--size", "832x480", "--json").document["plan"]
    assert (small["width"], small["height"], small["tokens"]) == (832, 480, 32_760)  # no rounding by an image's shape
    assert not any("480p" in note for note in small["notes"])


def test_the_geometry_is_the_size() -> None:
    for size in ((832, 480), (480, 832), (1280, 720), (1280, 160)):  # the last one is wider than an image may be
        exact = geometry_of(T2V_A14B, "area", size, 81, (0, 0))
        assert (exact.width, exact.height) == size and largest_geometry(T2V_A14B, *size, 81) == exact
    g = largest_geometry(T2V_A14B, 1280, 720, 81)
    assert memory.vae_bytes(T2V_A14B, g, "bf16") == memory.decode_bytes(T2V_A14B, g, "bf16")  # nothing is encoded


def test_a_video_from_text_needs_no_encoder_and_is_repeated(
    made: Callable[..., Outcome], wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanVAE, "encode", lambda *arguments, **options: pytest.fail("the VAE encoded a clip"))
    first = made()
    assert first.exit_code == 0, first.err
    assert iio.imread("out.mp4", plugin="pyav").shape == (5, 32, 48, 3)
    video = first.document["effective"]["video"]
    assert (video["image"], video["image_sha256"], video["last_image"]) == ("", "", None)
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.exit_code == 0, again.err
    assert again.document["output_sha256"] == first.document["output_sha256"]
    other = made("--output", "dog.mp4", prompt="a dog")
    assert other.document["output_sha256"] != first.document["output_sha256"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "cat.png"], "--image: Wan2.2-T2V-A14B makes videos from text alone: drop --image, or use --model"),
        (["--last-image", "cat.png"], "--last-image: Wan2.2-T2V-A14B makes videos from text alone: drop --last-image"),
        (["--fit", "crop"], "--fit: Wan2.2-T2V-A14B makes videos from text alone: drop --fit"),
        (["--recipe", "hybrid", "--lora", "x.safetensors"], "--recipe hybrid is for models that start from an image"),
        (["--recipe", "first-last-4", "--lora", "x.safetensors"], "--recipe first-last-4 is for models"),
        (["--recipe", "lightning-4"], "add `--lora-high-noise FILE --lora-low-noise FILE`"),  # no known pair fits
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_an_image_is_one_line(wanfast: Wanfast, options: list[str], words: str) -> None:
    outcome = wanfast(*PLANNED, *options)
    assert outcome.exit_code == 2 and words in outcome.err, outcome.err
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1


def test_other_commands_refuse_images_too(wanfast: Wanfast) -> None:
    warmup = ("warmup", "--model", "t2v-a14b", "--device", "cpu")
    for options, flag in ((("--image", "cat.png"), "--image"), (("--fit", "pad"), "--fit")):
        outcome = wanfast(*warmup, *options)
        assert outcome.exit_code == 2 and f"{flag}: Wan2.2-T2V-A14B makes videos from text alone" in outcome.err
    without = wanfast("generate", "--model", "a14b", "--prompt", "a cat", "--device", "cpu", "--dry-run")
    assert without.exit_code == 2 and "error: --image is missing: Wan2.2-I2V-A14B makes no video from" in without.err
    without = wanfast("generate", "--model", "tiny", "--prompt", "a cat")
    assert without.exit_code == 2 and "error: --image is missing: tiny makes no video from text alone" in without.err


def test_the_sizes_of_a_folder_say_its_kind(wanfast: Wanfast, small_text_model: Path, workdir: Path) -> None:
    """A folder without a wanfast.json has the other facts of the published model of its kind."""
    folder = workdir / "Wan2.2-T2V-Small"
    shutil.copytree(small_text_model, folder)
    (folder / "wanfast.json").unlink()
    d = TEXT_SPEC.dit
    sizes = {"dim": d.dim, "text_len": d.text_len, "in_dim": 16, "out_dim": 16, "text_dim": d.text_dim}
    sizes |= {name: getattr(d, name) for name in ("num_heads", "ffn_dim", "freq_dim", "num_layers", "eps")}
    (folder / "transformer/config.json").write_text(json.dumps(sizes))
    given = ("generate", "--model", str(folder), "--prompt", "a cat", *SHAPE, "--dry-run", "--json")
    plan = wanfast(*given).document["plan"]
    assert (plan["model"], plan["shift"], plan["guidance"]["high_noise"]) == ("Wan2.2-T2V-Small", 12.0, 4.0)
    (folder / "transformer/config.json").write_text(json.dumps({**sizes, "in_dim": 20}))
    refused = wanfast(*given)
    assert refused.exit_code == 2 and "reads 20 channels, but videos from images need 36, and" in refused.err


def test_doctor_knows_the_model(wanfast: Wanfast, small_text_model: Path, workdir: Path) -> None:
    document = wanfast("doctor", "--model", str(small_text_model), "--json").document
    assert document["weights"]["trouble"] is None and document["fit"]["size"] == "96x64"
    published = wanfast("doctor", "--model", "t2v-a14b", "--size", "832x480", "--json").document
    assert (published["fit"]["model"], published["fit"]["tokens"]) == ("Wan2.2-T2V-A14B", 32_760)
    assert "run `wanfast download --model t2v-a14b` (126 GB)" in published["weights"]["trouble"]
    config = workdir / "artifacts" / checkpoints("t2v-a14b", "original") / "high_noise_model/config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{")  # so that the facts cannot be read
    damaged = wanfast("doctor", "--model", "t2v-a14b", "--json").document
    assert damaged["fit"]["model"] == "Wan2.2-T2V-A14B" and str(config) in damaged["weights"]["trouble"]


def test_doctors_command_for_the_model_from_text_runs(wanfast: Wanfast, machine: Machine) -> None:
    machine(8, 141)
    given = {"model": "t2v-a14b", **example(T2V_A14B)}
    fitted = fit(given, T2V_A14B, gpus.visible_gpus())
    step = next_step(given, fitted, no_torch=None, no_weights=None, layout=None, quantize_step=None)
    assert "--image" not in step.command and step.command.endswith("--output video.mp4")
    missing = next_step(given, fitted, no_torch=None, no_weights="missing", layout=None, quantize_step=None)
    assert missing.command == "wanfast download --model t2v-a14b"
    program, *arguments = shlex.split(step.command)
    assert program == "wanfast" and wanfast(*arguments, "--dry-run").exit_code == 0


def test_the_published_curve_is_of_this_model(wanfast: Wanfast) -> None:
    ratios = published_curve(T2V_A14B)["ratios"]
    steps = steps_of("unipc", 40, 12.0, T2V_A14B.boundary)
    assert len(ratios) == 40 and ratios != published_curve(A14B)["ratios"]
    assert min(range(39), key=lambda step: ratios[step][0]) == 26 == [of for of, _ in steps].count("high_noise")
    magcache = wanfast(*PLANNED, "--magcache", "E006K2R20", "--json").document["plan"]["magcache"]
    assert magcache["curve"] == "preset" and magcache["rule"] == "both-experts"  # the authors' rule for this model
    settings = MagCacheSettings(0.06, 2, 0.2, "both-experts")
    wanted = plan_skips([tuple(row) for row in ratios], [of for of, _ in steps], settings, joint=True)
    assert list(zip(magcache["skips_prompt"], magcache["skips_negative_prompt"], strict=True)) == list(wanted)
    assert magcache["skipped_forwards"] > 20
    rule = wanfast(*PLANNED, "--magcache", "preset", "--magcache-rule", "low-noise-only", "--json").document
    assert rule["plan"]["magcache"]["rule"] == "low-noise-only"


def test_a_curve_is_calibrated_from_texts(made: Callable[..., Outcome], wanfast: Wanfast, workdir: Path) -> None:
    assert len(read_set(shipped_set(TEXT_SPEC), 0, takes_images=False)) == 4
    refused = made("--magcache", "artifact")
    assert refused.exit_code == 3
    (workdir / "clips.jsonl").write_text('{"prompt": "a cat"}')
    measured = wanfast(*refused.err.split("`")[1].split()[1:], "--set", ".", "--json")
    assert measured.exit_code == 0, measured.err
    used = made("--magcache", "artifact", "--magcache-thresh", "9", "--retention-ratio", "0")
    assert used.document["plan"]["magcache"]["curve"] == measured.document["key"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"image": "cat.png", "prompt": "a cat"}, "the model makes videos from text alone: remove the key image"),
        ({"text": "a cat"}, 'needs the key prompt, such as {"prompt": "A cat jumps."}'),
    ],
)
def test_a_set_of_texts_has_only_prompts(
    wanfast: Wanfast, small_text_model: Path, workdir: Path, line: dict[str, str], words: str
) -> None:
    (workdir / "clips.jsonl").write_text(json.dumps(line))
    outcome = wanfast("calibrate-magcache", "--model", str(small_text_model), *SHAPE, "--set", ".")
    assert outcome.exit_code == 2 and f"line 1 of clips.jsonl{':' * ('alone' in words)} {words}" in outcome.err


def test_bench_measures_it(wanfast: Wanfast, small_text_model: Path) -> None:
    given = ("--model", str(small_text_model), *SHAPE, "--attention", "auto", "--repeats", "1", "--json")
    outcome = wanfast("bench", *given, "--recipes", "baseline,first-last-4", "--steps-measured", "3")
    assert outcome.exit_code == 0, outcome.err
    report = outcome.document
    baseline, between = report["rows"]
    assert baseline["status"] == "measured" and baseline["published_s"] is None
    assert [list(clip) for clip in report["clips"]] == [["prompt", "seed", "video_size"]] * 2
    assert between["status"] == "not available" and "is for models that start from an image" in between["reason"]


@torch.inference_mode()
def test_a_block_is_compiled_in_advance(small_text_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = plan_small_model(small_text_model)
    counter = compiler(monkeypatch, warmup)
    warmup._forward(with_options(plan, compile=True, attention="math"), Ranks("cpu"), Stopwatch("cpu"), "math")
    assert counter.frame_count == 1


def test_a_run_from_an_image_is_not_repeated_from_text(wanfast: Wanfast, small_text_model: Path, workdir: Path) -> None:
    """The image of that run cannot be dropped by an option, and its shift and guidance are another model's."""
    wanfast("generate", "--model", "tiny", *SHAPE, "--image", "cat.png", "--prompt", "a cat", "--seed", "1")
    again = wanfast("generate", "--from", "out.json", "--model", str(small_text_model), "--dry-run")
    assert again.exit_code == 2 and len(again.err.splitlines()) == 1
    assert "--from: the earlier video starts from an image, but --model /" in again.err
    assert wanfast("generate", "--from", "out.json", "--model", "a14b", "--dry-run").exit_code == 0


def test_python_makes_it(forked: None, workdir: Path, small_text_model: Path) -> None:
    with api.open(model=small_text_model, device="cpu", num_gpus=2, size="48x32", frames=5) as handle:
        video = handle.make(prompt="a cat", seed=1, size="48x32", frames=5, steps=2)
        assert video.frames.shape == (5, 32, 48, 3)
        with pytest.raises(ConfigError, match="--image: small text makes videos from text alone"):
            handle.make(prompt="a cat", image="cat.png")
    video.save("a.mp4")


def test_the_server_makes_it(workdir: Path, small_text_model: Path) -> None:
    options = {"model": str(small_text_model), "device": "cpu", "size": "48x32", "frames": 5}
    with running(workdir, options=options, max_clips=None) as server:
        answer = server.ask("POST", "/v1/videos", prompt="a cat", input_reference=data_url(STAR.read_bytes()))
        assert (answer.status, answer.error["param"]) == (400, "input_reference")
        assert answer.error["message"] == "input_reference: this model makes videos from text alone: leave it out"
        for seconds, status in (("0.25", 200), ("0.5", 400)):  # one clip
            answer = server.ask("POST", "/v1/videos", prompt="a cat", seconds=seconds)
            assert answer.status == status, answer.body
        assert answer.error["message"] == (
            "seconds: one video has at most 5 frames on this server (0.3125 seconds at 16 frames per second), because "
            "this model cannot start a clip from an image"
        )
        answer = server.ask("POST", "/v1/videos", prompt="a cat", seed=7)
        assert answer.status == 200, answer.body
        assert server.ended(answer.document["id"])["status"] == "completed"
        _, made = server.maker.made
        assert "image" not in made and "fit" not in made and (made["prompt"], made["size"]) == ("a cat", "48x32")
        schema = server.ask("GET", "/openapi.json").document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
        assert all("input_reference" not in kind["schema"]["properties"] for kind in schema.values())
