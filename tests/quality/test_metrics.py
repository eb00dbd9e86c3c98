"""Tests the quality metrics against scikit-image's, and the tracker on clips whose motion is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from training.spec import SPEC
from wanfast.quality import metrics, tiny
from wanfast.quality.motions import MOTIONS
from wanfast.quality.tracking import classify, track
from wanfast.quality.world import COLOURS, Renderer, draw_scene, is_held_out, moments_of_clip
from wanfast.runtime.engine.pixels import to_uint8
from wanfast.runtime.sampling.scheduler import grid
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import TINY


def videos() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 4, 12, 14, generator=generator)
    reference = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear") * 2 - 1
    return (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clamp(-1, 1), reference


def test_psnr_and_ssim_equal_scikit_image() -> None:
    video, reference = videos()
    x, y = (((v.double() + 1) / 2).numpy() for v in (video, reference))
    assert metrics.psnr(video, reference) == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1), abs=1e-6)
    expected = np.mean(
        [
            structural_similarity(
                y[c, f], x[c, f], data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            for c in range(3)
            for f in range(4)
        ]
    )
    assert metrics.ssim(video, reference) == pytest.approx(expected, abs=1e-5)


def test_equal_videos_are_perfect_and_worse_ones_are_worse() -> None:
    video, reference = videos()
    assert metrics.psnr(reference, reference) == float("inf")
    assert metrics.ssim(reference, reference) == pytest.approx(1)
    assert metrics.ms_ssim(reference, reference) == pytest.approx(1)
    worse = (2 * video - reference).clamp(-1, 1)
    for metric in (metrics.psnr, metrics.ssim, metrics.ms_ssim):
        assert metric(worse, reference) < metric(video, reference)


def test_flicker_is_not_motion() -> None:
    ramp = torch.linspace(-1, 1, 9).view(1, 9, 1, 1).expand(3, 9, 8, 8)  # steady change
    blink = torch.tensor([-0.5, 0.5] * 4).view(1, 8, 1, 1).expand(3, 8, 8, 8)
    assert metrics.flicker(ramp) < 1e-4 < metrics.motion(ramp)
    assert metrics.flicker(blink) == pytest.approx(2 * metrics.motion(blink), rel=1e-6)
    assert metrics.motion(blink) == pytest.approx(127.5)
    assert metrics.flicker(blink[:, :1]) == metrics.motion(blink[:, :1]) == 0


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer("cpu")


@pytest.mark.parametrize("held_out", [False, True])
def test_the_tracker_reads_true_clips(renderer: Renderer, held_out: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(12):
        scene = draw_scene(seed, held_out=held_out, camera_share=0.0)
        (clip,) = renderer([scene], moments_of_clip())  # one at a time, because 12 at once need gigabytes
        noisy = clip + 0.04 * torch.randn(clip.shape, generator=generator)
        verdict = classify(to_uint8(noisy), COLOURS[scene.subject.colour])
        assert verdict.motion == scene.motion, (scene.caption, verdict)


def test_the_tracker_can_fail(renderer: Renderer) -> None:
    scene = next(s for s in map(draw_scene, range(100)) if s.motion == "right" and s.camera is None)
    (clip,) = renderer([scene], moments_of_clip())
    colour = COLOURS[scene.subject.colour]
    assert classify(to_uint8(clip.flip(1)), colour).motion == "left"
    assert classify(to_uint8(clip[:, :1].expand_as(clip)), colour).motion == "still"
    assert classify(to_uint8(clip.flip(2).transpose(2, 3)), colour).motion in ("up", "down")
    assert track(np.zeros((3, 64, 64, 3), np.uint8), (245, 245, 245)) is None
    assert classify(np.zeros((3, 64, 64, 3), np.uint8), (245, 245, 245)).motion is None


def test_motions_begin_where_they_stand_and_differ() -> None:
    moments = np.linspace(0, 1, 17)
    paths = {name: motion.at(moments) for name, motion in MOTIONS.items()}
    for path in paths.values():
        assert path.shape == (17, 4) and not path[0].any()
    names = list(paths)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            assert np.abs(paths[first] - paths[second]).max() > 0.1


def test_the_split_is_by_combination() -> None:
    def combinations(held_out: bool, count: int) -> set[tuple[str, str, str]]:
        scenes = [draw_scene(seed, held_out=held_out) for seed in range(count)]  # including camera motions
        return {(scene.subject.shape, scene.subject.colour, scene.motion) for scene in scenes}

    train, held = combinations(False, 2000), combinations(True, 300)
    assert all(is_held_out(*combination) for combination in held)
    assert not any(is_held_out(*combination) for combination in train)
    assert 0.05 < len(held) / (len(held) + len(train)) < 0.2
    assert draw_scene(5) == draw_scene(5) != draw_scene(6)


def test_ms_ssim_is_the_weighted_product_of_the_scales() -> None:
    """MS-SSIM follows Wang et al. 2003 on scikit-image's maps: only the last scale has the luminance term."""
    video, reference = videos()
    x, y = (((v.double() + 1) / 2).numpy()[0] for v in (video, reference))

    def halved(image: np.ndarray) -> np.ndarray:
        return (image[0::2, 0::2] + image[1::2, 0::2] + image[0::2, 1::2] + image[1::2, 1::2]) / 4

    def contrast_structure(a: np.ndarray, b: np.ndarray) -> float:
        # SSIM has no luminance term for images whose local mean is set to one value
        options = {
            "data_range": 1,
            "gaussian_weights": True,
            "sigma": 1.5,
            "use_sample_covariance": False,
            "full": True,
        }
        blur = partial(gaussian_filter, sigma=1.5, truncate=3.5)
        _, full = structural_similarity(a, b, **options)
        luminance = (2 * blur(a) * blur(b) + 1e-4) / (blur(a) ** 2 + blur(b) ** 2 + 1e-4)
        return float((full / luminance)[5:-5, 5:-5].mean())

    frames = range(4)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363])
    assert min(x.shape[-2:]) // 11 == 8  # four scales fit a 96-pixel side
    values = [np.mean([contrast_structure(x[f], y[f]) for f in frames])]
    for _ in range(2):
        x, y = (np.stack([halved(v[f]) for f in frames]) for v in (x, y))
        values.append(np.mean([contrast_structure(x[f], y[f]) for f in frames]))
    x, y = (np.stack([halved(v[f]) for f in frames]) for v in (x, y))
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values.append(np.mean([structural_similarity(x[f], y[f], **options) for f in frames]))
    expected = np.prod(np.array(values) ** (weights / weights.sum()))
    got = metrics.ms_ssim(video[:1].expand(3, -1, -1, -1), reference[:1].expand(3, -1, -1, -1))
    assert got == pytest.approx(expected, abs=1e-4)


def test_videos_of_other_shapes_are_refused() -> None:
    video, reference = videos()
    for metric in (metrics.psnr, metrics.ssim, metrics.ms_ssim):
        with pytest.raises(ValueError, match="shapes must be equal"):
            metric(video, reference[:, :1])
        with pytest.raises(ValueError, match="11 pixels"):
            metric(video[..., :8], reference[..., :8])


def test_the_interval_is_wilsons() -> None:
    assert tiny.wilson(93, 100) == pytest.approx((0.8625, 0.9657), abs=1e-4)  # Wilson 1927, z = 1.96
    assert tiny.wilson(0, 10)[0] == 0 and tiny.wilson(10, 10)[1] == 1
    assert tiny.share_right(["up", "up", "left"], ["up", None, "left"])["right"] == 2


@pytest.fixture(scope="module")
def verdicts() -> list[dict[str, object]]:
    """Judges a held-out pair with the shipped model, like `make tiny-quality`; test_skipping judges another."""
    judge = tiny.Judge(tiny.Settings("tiny", steps=40, guidance=2.0, precision="bf16"))
    return [judge(tiny.Task(index, with_prompt=True)) for index in (2,)]


@pytest.mark.slow
def test_the_shipped_model_does_what_the_prompt_says(verdicts: list[dict[str, object]]) -> None:
    for verdict in verdicts:
        assert verdict["shown"] == verdict["asked"], verdict
        assert verdict["first_frame_psnr"] >= 28
        assert verdict["vae_psnr"] >= 32
        assert verdict["psnr"] >= 27


@pytest.mark.slow
def test_residual_ratios_are_those_of_one_branch(verdicts: list[dict[str, object]]) -> None:
    ratios = np.array(verdicts[0]["ratios"])
    assert ratios.shape == (40, 2)
    assert ratios[:, 0].tolist() == list(grid("unipc", 40, 5.0).timesteps)
    assert ratios[0, 1] == 1
    assert 0.7 < ratios[-1, 1] < ratios[20, 1] < 1.1


def test_the_shipped_files_are_small_and_bf16() -> None:
    files = [file for file in TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 30e6
    for file in TINY.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}, file
    spec = model_files.locate("tiny", "artifacts").spec
    statistics = {"latents_mean": spec.vae.latents_mean, "latents_std": spec.vae.latents_std}
    assert replace(SPEC, vae=replace(SPEC.vae, **statistics)) == spec
