"""Tests `--last-image` through the command line and the Python API, with the tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import wanfast as api
from tests.conftest import Outcome
from wanfast.magcache_calib.clips import digest_of, read_set
from wanfast.runtime.config.recipes import with_recipe
from wanfast.runtime.engine import pipeline as pipeline_module
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.models.vae import WanVAE

Wanfast = Callable[..., Outcome]
SHAPE = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "4")
FIRST = ("generate", *SHAPE, "--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--json")
BOTH = (*FIRST, "--last-image", "last.png")
DRY = (*BOTH, "--dry-run")


@pytest.fixture(autouse=True)
def last_image(workdir: Path) -> None:
    """Writes a last image, of the first one's shape."""
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save("last.png")


def test_the_last_image_reaches_the_video_its_json_and_from(wanfast: Wanfast, workdir: Path) -> None:
    plain = wanfast(*FIRST, "--output", "plain.mp4").document
    made = wanfast(*BOTH).document
    assert made["output_sha256"] != plain["output_sha256"]
    assert made["plan"]["images"] == {f"--{name}": str(workdir / file) for name, file in IMAGES.items()}
    video = made["effective"]["video"]
    assert video["last_image"] == str(workdir / "last.png") and len(video["last_image_sha256"]) == 64
    assert plain["effective"]["video"]["last_image"] is None and list(plain["plan"]["images"]) == ["--image"]
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.document["output_sha256"] == made["output_sha256"]

    shutil.copy("cat.png", "last.png")
    refused = wanfast("generate", "--from", "out.json", "--output", "other.mp4")
    assert refused.exit_code == 2
    assert f"--from: {workdir / 'last.png'} is not the last image of the earlier run" in refused.err
    assert "give --last-image" in refused.err
    given = wanfast("generate", "--from", "out.json", "--output", "other.mp4", "--last-image", "last.png", "--json")
    assert given.document["output_sha256"] not in (made["output_sha256"], plain["output_sha256"])


IMAGES = {"image": "cat.png", "last-image": "last.png"}


def test_both_images_are_fitted_alike(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last image is the first one on another canvas; cropped, both are equal."""
    image = Image.open("cat.png").resize((64, 64))
    image.save("square.png")
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste(image, (16, 0))
    wide.save("wide.png")
    encode, log = WanVAE.encode, Path("equal")

    def looked(self: WanVAE, video: Any, **options: Any) -> Any:
        log.write_text(str(bool((video[:, :, 0] == video[:, :, -1]).all())))
        return encode(self, video, **options)

    monkeypatch.setattr(pipeline_module.WanVAE, "encode", looked)
    given = ("--image", "square.png", "--last-image", "wide.png", "--overwrite")
    for fit, equal in (("crop", "True"), ("pad", "False"), ("area", "False")):
        outcome = wanfast(*FIRST, *given, "--fit", fit)
        assert outcome.exit_code == 0, outcome.err
        assert log.read_text() == equal
        stretched = "--last-image: the 96x64 image is stretched to 64x64" in outcome.err
        assert stretched == (fit == "area")
    assert "--last-image: --fit crop: the video shows the middle 64x64 of the 96x64 image" in wanfast(
        *FIRST, *given, "--fit", "crop", "--dry-run"
    ).err  # fmt: skip


def test_a_last_image_of_the_first_one_s_shape_has_no_note(wanfast: Wanfast) -> None:
    """Also if the video's size, in multiples of 16, has another shape than both."""
    for name, size in (("first", (512, 384)), ("last", (256, 192)), ("other", (512, 300))):
        Image.new("RGB", size, "red").save(f"{name}.png")
    given = ("generate", "--model", "tiny", "--image", "first.png", "--prompt", "p", "--output", "o.mp4", "--dry-run")
    notes = {name: wanfast(*given, "--last-image", f"{name}.png").err for name in ("last", "other")}
    assert "144x96" in notes["last"] and "--last-image: the" not in notes["last"]
    assert "--last-image: the 512x300 image is stretched to 144x96" in notes["other"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--last-image", ""], "error: --last-image : has an empty value: give an image file"),
        (["--last-image", "none.png"], "error: --last-image none.png: no such file; check the path"),
        (["--frames", "1"], "error: --last-image needs a first and a last frame: use --frames 5 or more"),
        (["--output", "last.mp4"], "would overwrite a file that a video is made from"),
        (["--magcache", "preset"], "error: --magcache preset: no curve ships for videos with --last-image: run `wan"),
        (["--magcache", "E012K2R20"], "error: --magcache E012K2R20: no curve ships for videos with --last-image: run"),
        (["--recipe", "fast"], "error: --recipe fast: no curve ships for videos with --last-image: run `wanfast "
         "calibrate-magcache --model tiny --recipe fast --size 64x64 --frames 5 --steps 4 --set FOLDER`, where each "
         "line of FOLDER/clips.jsonl names a last_image, then use --magcache artifact; or use --magcache off"),
        (["--recipe", "fast", "--quantize", "int8-dynamic"], " --recipe fast --quantize int8-dynamic --size 64x64 "),
        (["--magcache", "artifact"], "calibrate-magcache --model tiny --size 64x64 --frames 5 --steps 4 --set FOLDER"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_one_line(wanfast: Wanfast, options: list[str], words: str) -> None:
    if "--output" in options:
        shutil.copy("last.png", "last.mp4")
        options = [*options, "--last-image", "last.mp4", "--overwrite"]
    outcome = wanfast(*DRY, *options)
    assert outcome.exit_code in (2, 3) and words in outcome.err.replace(f"{Path.cwd()}/", ""), outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_last_image_that_changes_after_the_plan_is_refused(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanfast.runtime.engine import session

    load_models = session.load_models

    def load_and_change(*arguments: object) -> object:
        Image.new("RGB", (64, 48)).save("last.png")
        return load_models(*arguments)

    monkeypatch.setattr(session, "load_models", load_and_change)
    outcome = wanfast(*BOTH)
    assert outcome.exit_code == 2 and "error: --last-image " in outcome.err and "changed since the plan" in outcome.err


def test_a_line_of_a_list_names_its_last_image_beside_the_list(wanfast: Wanfast, workdir: Path) -> None:
    (workdir / "videos").mkdir()
    shutil.move("last.png", "videos/end.png")
    (workdir / "videos/jobs.jsonl").write_text(json.dumps({"last_image": "end.png"}))
    outcome = wanfast(*FIRST, "--jobs", "videos/jobs.jsonl", "--dry-run")
    (found,) = outcome.document["results"]
    assert found["plan"]["images"]["--last-image"] == str(workdir / "videos/end.png")


def test_the_plan_shows_the_last_image(wanfast: Wanfast) -> None:
    outcome = wanfast(*(word for word in DRY if word != "--json"))
    assert any(line.split() == ["last", "image", "last.png"] for line in outcome.out.replace("│", "").splitlines())


def test_python_takes_a_last_image(forked: None, workdir: Path) -> None:
    options: dict[str, Any] = {"image": Path("cat.png"), "prompt": "a cat", "seed": 1}
    with api.open(model="tiny", device="cpu", num_gpus=2, size="64x64", frames=5) as handle:
        plain, both = (
            handle.make(**options, size="64x64", frames=5, steps=2, **last)
            for last in ({}, {"last_image": Path("last.png")})
        )
    assert (plain.frames != both.frames).any()
    assert both.plan["images"]["--last-image"] == str(workdir / "last.png")
    with pytest.raises(ConfigError, match=r"last\.png is a file that this video is made from"):
        both.save("last.png", overwrite=True)


def test_the_recipe_of_distilled_weights_wants_a_last_image(wanfast: Wanfast) -> None:
    weights = ("--lora", "style.safetensors")
    of_recipe = ("generate", "--model", "tiny", "--device", "cpu", "--image", "cat.png", "--prompt", "a", "--dry-run")
    refused = wanfast(*of_recipe, "--recipe", "first-last-4", *weights)
    assert refused.exit_code == 2 and "error: --recipe first-last-4 needs a last image" in refused.err
    missing = wanfast(*of_recipe, "--recipe", "first-last-4", "--last-image", "last.png")
    assert missing.exit_code == 2 and "--recipe first-last-4 needs distilled weights of both experts" in missing.err
    given = with_recipe({"recipe": "first-last-4"})
    assert given["switch_step"] == 2
    shifted = [16 * s / (1 + 15 * s) for s in (1, 0.75, 0.5, 0.25)]
    assert [float(level) for level in given["sigmas"].split(",")] == pytest.approx(shifted, abs=1e-9)


def test_a_list_of_levels_has_no_curve_with_a_last_image(wanfast: Wanfast) -> None:
    """Such a curve cannot be measured, so no command is named."""
    without_steps = [word for word in DRY if word not in ("--steps", "4")]
    outcome = wanfast(*without_steps, "--sigmas", "1,0.9,0.5", "--magcache", "preset")
    assert outcome.exit_code == 2 and outcome.err.endswith("for videos with --last-image: use --magcache off\n")


@pytest.fixture
def clips(workdir: Path) -> Path:
    (workdir / "set").mkdir()
    for name in ("cat.png", "last.png"):
        shutil.copy(name, workdir / "set")
    lines = [{"image": "cat.png", "last_image": "last.png", "prompt": prompt} for prompt in ("a cat", "a dog")]
    (workdir / "set/clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return workdir / "set"


def test_a_curve_is_for_videos_with_a_last_image_or_without(wanfast: Wanfast, clips: Path) -> None:
    refused = wanfast(*DRY, "--magcache", "artifact")
    assert refused.exit_code == 3
    command = refused.err.split("`")[1].replace("FOLDER", str(clips)).split()
    measured = wanfast(*command[1:], "--json")
    assert measured.exit_code == 0, measured.err
    curve = measured.document
    assert wanfast(*DRY, "--magcache", "artifact").document["plan"]["magcache"]["curve"] == curve["key"]
    without = wanfast(*FIRST, "--dry-run", "--magcache", "artifact")
    assert without.exit_code == 3 and f"(the curve {curve['key']} has last images): run" in without.err
    assert "--set" not in without.err

    of_both = read_set(clips, 0)
    shutil.copy("cat.png", clips / "last.png")
    assert digest_of(read_set(clips, 0)) != digest_of(of_both)

    lines = [{"image": "cat.png", "prompt": prompt} for prompt in ("a cat", "a dog")]
    (clips / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plain = wanfast(*command[1:], "--json").document
    assert plain["key"] != curve["key"] and plain["ratios"] != curve["ratios"]
    assert wanfast(*FIRST, "--dry-run", "--magcache", "artifact").document["plan"]["magcache"]["curve"] == plain["key"]


def test_a_set_is_of_one_kind(wanfast: Wanfast, clips: Path) -> None:
    with (clips / "clips.jsonl").open("a") as stream:
        stream.write('\n{"image": "cat.png", "prompt": "a bird"}')
    outcome = wanfast("calibrate-magcache", *SHAPE, "--set", "set")
    assert outcome.exit_code == 2
    assert "line 3 of clips.jsonl: give every line a last_image, or remove last_image from every line" in outcome.err
