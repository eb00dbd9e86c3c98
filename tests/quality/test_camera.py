"""Tests photographs under a camera: what a frame shows, that it stays inside, and that the judge reads true clips."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from tests.conftest import Outcome
from tests.small_pack import PICTURES, write_pack
from training.photographs import PACK
from wanfast.quality import camera, registration, tiny
from wanfast.quality.camera import CAMERAS
from wanfast.quality.photographs import Photographs, Shot
from wanfast.quality.world import Renderer, Scene, camera_scene, draw_photo_scene, moments_of_clip, read_caption
from wanfast.runtime.engine.pixels import to_uint8
from wanfast.runtime.media.earlier_video import earlier_frames
from wanfast.runtime.store import model_files

EXAMPLES = model_files.TINY.parent / "examples/jobs.jsonl"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("pack") / "photographs.zip")


@pytest.fixture(scope="module")
def held_out(pack: Path) -> Photographs:
    return Photographs(pack, "cpu", held_out=True)


def test_the_split_is_by_picture(pack: Path, held_out: Photographs) -> None:
    assert Photographs(pack, "cpu", held_out=False).names == ["coffee"]
    assert held_out.names == ["astronaut", "chelsea"]
    assert held_out.pictures[1].shape == (3, 300, 451)


def test_the_examples_are_captions_of_a_shape_and_of_a_camera() -> None:
    shape, photograph = (json.loads(line) for line in EXAMPLES.read_text().splitlines())
    assert read_caption(shape["prompt"]) == ("orange", "right")
    assert [name for name, of in CAMERAS.items() if photograph["prompt"] in of.phrases] == ["pan right"]
    assert photograph["image"] == "cat.jpg"  # chelsea, which is held out


@pytest.mark.slow
def test_the_photograph_of_the_examples_moves_and_stays_one(wanfast: Callable[..., Outcome], workdir: Path) -> None:
    job = json.loads(EXAMPLES.read_text().splitlines()[1])
    image = ("--image", str(EXAMPLES.with_name(job["image"])), "--prompt", job["prompt"], "--seed", "1")
    made = wanfast("generate", "--model", "tiny", "--device", "cpu", *image, "--output", "cat.mp4", "--json")
    assert made.exit_code == 0, made.err
    frames = np.stack([*earlier_frames("cat.mp4")])
    assert registration.classify(frames).camera == "pan right"
    given = Image.open(EXAMPLES.with_name(job["image"])).resize((144, 96), Image.Resampling.LANCZOS)
    likeness = 10 * np.log10(255**2 / np.square(frames[0] - np.asarray(given, dtype=float)).mean())
    print(f"first frame: {likeness:.1f} dB")
    assert likeness >= 24  # a pattern may move, too


@pytest.mark.parametrize("name", list(CAMERAS))
def test_the_judge_reads_every_camera_in_true_clips(held_out: Photographs, name: str) -> None:
    index = list(CAMERAS).index(name)
    scene = camera_scene(index, held_out, (96, 96), photograph=index % 2)
    assert scene.camera == name
    (clip,) = Renderer("cpu", held_out)([scene], moments_of_clip(9), size=(96, 96))
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(index))
    verdict = registration.classify(to_uint8(clip + 0.04 * noise))
    assert verdict.camera == name, verdict


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PACK.exists(), reason="needs training/photographs.zip: python -m training.photographs")
def test_the_judge_reads_98_of_100_true_clips() -> None:
    photographs = Photographs(PACK, "cpu", held_out=True)
    renderer, generator = Renderer("cpu", photographs), torch.Generator().manual_seed(0)
    right = 0
    for index in range(100):
        scene = camera_scene(index, photographs, (128, 128))
        (clip,) = renderer([scene], moments_of_clip())
        noisy = clip + 0.02 * torch.randn(clip.shape, generator=generator)
        right += registration.classify(to_uint8(noisy)).camera == scene.camera
    assert len(photographs.names) == 100 and right >= 98


def test_the_judge_can_fail(held_out: Photographs) -> None:
    scene = camera_scene(0, held_out, (96, 96), photograph=0)
    (clip,) = Renderer("cpu", held_out)([scene], moments_of_clip(9), size=(96, 96))
    assert scene.camera == "pan right"
    assert registration.classify(to_uint8(clip.flip(1))).camera == "pan left"
    assert registration.classify(to_uint8(clip.flip(3))).camera == "pan left"
    assert registration.classify(to_uint8(clip[:, :1].expand_as(clip))).camera == "still"
    assert registration.classify(np.zeros((3, 64, 64, 3), np.uint8)).camera is None


def test_a_frame_is_the_photograph_where_the_camera_looks(held_out: Photographs) -> None:
    """The last frame equals scikit-image's warp by the camera's similarity, up to how both smooth."""
    picture = PICTURES["astronaut"]()
    for name in ("pan down", "zoom in", "turn right"):
        shot = Shot(0, (260.0, 200.0), 256.0)
        (clip,) = Renderer("cpu", held_out)([Scene(None, "still", "", name, shot=shot)], moments_of_clip(5))
        x, y, zoom, roll = CAMERAS[name].end
        scale = 2 / np.exp(zoom)  # pixels of the photograph for one of the frame
        centre = SimilarityTransform(translation=(-63.5, -63.5))
        place = SimilarityTransform(scale=scale, rotation=roll, translation=(259.5 + 256 * x, 199.5 + 256 * y))
        smooth = np.asarray(Image.fromarray(picture)) / 255
        expected = warp(smooth, centre + place, output_shape=(128, 128), order=1)
        error = np.abs((clip[:, -1].permute(1, 2, 0).numpy() + 1) / 2 - expected)
        assert np.median(error) < 0.02, (name, np.median(error))


@pytest.mark.parametrize("size", [(128, 128), (144, 96), (96, 144), (288, 208)])
def test_no_frame_leaves_its_photograph(held_out: Photographs, size: tuple[int, int]) -> None:
    half = np.array(size) / min(size) / 2
    for seed in range(60):
        rng = random.Random(seed)
        name = rng.choice(list(CAMERAS))
        shot = held_out.draw(rng, name, size, index=seed % 2 if seed % 3 else None)
        height, width = held_out.pictures[shot.photograph].shape[1:]
        for x, y, zoom, roll in CAMERAS[name].at(np.linspace(0, 1, 17)):
            for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                a, b = corner * half / np.exp(zoom)
                seen = (a * np.cos(roll) - b * np.sin(roll) + x, a * np.sin(roll) + b * np.cos(roll) + y)
                place = np.array(shot.centre) + shot.short_side * np.array(seen)
                assert (place >= -1e-6).all() and (place <= np.array((width, height)) + 1e-6).all()


def test_a_mirrored_photograph_is_the_mirror_image(held_out: Photographs) -> None:
    renderer = Renderer("cpu", held_out)

    def first(shot: Shot) -> torch.Tensor:
        return renderer([Scene(None, "still", "", "still", shot=shot)], moments_of_clip(5))[0, :, 0]

    plain, mirrored = first(Shot(0, (200.0, 256.0), 256.0)), first(Shot(0, (312.0, 256.0), 256.0, mirrored=True))
    assert torch.allclose(plain.flip(-1), mirrored, atol=1e-4)
    tinted = first(Shot(0, (200.0, 256.0), 256.0, gains=(0.5, 1.0, 1.0)))
    assert torch.allclose((tinted[0] + 1) * 2, plain[0] + 1, atol=1e-5) and torch.equal(tinted[1:], plain[1:])


def test_a_window_is_a_part_of_the_frame(held_out: Photographs) -> None:
    renderer = Renderer("cpu", held_out)
    scene = draw_photo_scene(3, held_out, (144, 96), with_shapes=True)
    whole = renderer([scene], moments_of_clip(5), size=(144, 96))
    assert whole.shape == (1, 3, 5, 96, 144)
    part = renderer([scene], moments_of_clip(5), (40, 16, 64), size=(144, 96))
    assert torch.allclose(part, whole[..., 16:80, 40:104], atol=1e-5)


def test_scenes_over_a_photograph_say_what_moves(held_out: Photographs) -> None:
    for seed in range(40):
        alone = draw_photo_scene(seed, held_out, (128, 128), with_shapes=False)
        assert alone.subject is None and any(
            alone.caption.startswith(phrase.removesuffix(".")) for phrase in CAMERAS[alone.camera or ""].phrases
        )
        over = draw_photo_scene(seed, held_out, (128, 128), with_shapes=True)
        assert over.subject is not None and over.shot is not None and "background" not in over.caption
        assert over.camera is None or over.motion == "still"  # one of both moves


def test_cameras_have_three_phrases_each_and_differ() -> None:
    moments = np.linspace(0, 1, 17)
    names = list(CAMERAS)
    for k, name in enumerate(names):
        assert len(set(CAMERAS[name].phrases)) >= 3
        for other in names[k + 1 :]:
            assert np.abs(CAMERAS[name].at(moments) - CAMERAS[other].at(moments)).max() > 0.1
    phrases = [phrase for name in names for phrase in CAMERAS[name].phrases]
    assert len(set(phrases)) == len(phrases)
    assert camera.caption("pan left", 0.0, 0.1) == "The camera pans left over a photograph."


def test_the_judge_asks_for_shapes_cameras_and_some_last_frames() -> None:
    tasks = tiny.tasks_of(3, 1, 2, ("shape", "camera"))
    assert [(task.mover, task.with_prompt, task.with_last) for task in tasks] == (
        [("shape", True, False)] * 3
        + [("shape", False, False)]
        + [("shape", True, True)] * 2
        + [("camera", True, False)] * 3
        + [("camera", False, False)]
        + [("camera", True, True)] * 2
    )
    assert len(tiny.tasks_of(3, 1, 2, ("shape",))) == 6


def test_the_camera_is_judged_and_a_last_frame_is_given(pack: Path) -> None:
    settings = tiny.Settings("tiny", 2, 2.0, "fp32", side=64, frames=5, photographs=str(pack))
    judge = tiny.Judge(settings)
    shape, shape_last, plain, last = (judge(task) for task in tiny.tasks_of(1, 0, 1, tiny.movers_of(settings)))
    assert shape["psnr"] != shape_last["psnr"] and shape["caption"] == shape_last["caption"]
    assert plain["asked"] == last["asked"] == "pan right" and plain["caption"] == last["caption"]
    assert plain["psnr"] != last["psnr"]  # same noise and prompt, so the last frame made the difference
    near = {**last, "last_frame_psnr": 26.0}
    summary = tiny.summarise([shape, plain, last, near], settings, 1.0)
    assert summary["prompt_following"]["of"] == summary["camera"]["prompt_following"]["of"] == 1
    assert summary["chance"] == 1 / 10 and summary["camera"]["chance"] == pytest.approx(1 / 9)
    assert last["last_frame_psnr"] < 25  # two steps reach nothing
    assert summary["camera"]["last_frame_psnr"] == round((last["last_frame_psnr"] + 26) / 2, 3)
    assert summary["camera"]["last_frame_psnr_least"] == round(last["last_frame_psnr"], 3)
    reached = summary["camera"]["last_frame_reached"]
    assert (reached["right"], reached["of"], reached["share"]) == (1, 2, 0.5)
    assert summary["camera"]["last_frame_given"]["of"] == 2
