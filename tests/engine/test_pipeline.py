"""Tests the whole image-to-video path against diffusers' pipeline: image and prompt in, final latents out.

Both use the same random weights from the files that diffusers wrote, both experts, unequal guidance, real cleaning and
tokenizing. Diffusers gets the reference's noise levels, our noise, and the image as our reader fitted it, because
diffusers resizes with another filter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.test_rank_groups import given_images
from tests.parity import relative_error
from tests.public_model import save_diffusers
from tests.small_model import frames_of
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading
from wanfast.runtime.engine.conditioning import draw_noises
from wanfast.runtime.engine.prompt_embeds import prompt_embeds
from wanfast.runtime.facts.model_spec import T2V_A14B, ModelSpec
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.builders import build_expert, build_umt5, build_vae

PROMPT = "A red circle moves right，“slowly” &amp; stops.  La fin…"
NEGATIVE = "静态，模糊, still"


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanImageToVideoPipeline, Path]:
    folder = tmp_path_factory.mktemp("model") / "diffusers"
    return save_diffusers(folder), folder


@pytest.fixture(scope="module")
def original_layout(public: tuple[WanImageToVideoPipeline, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the same weights in the original repository's layout: experts in shards, UMT5 and VAE as .pth."""
    files = model_files.locate(str(public[1]), "artifacts")
    folder = tmp_path_factory.mktemp("model") / "original"
    write_original(files, folder)
    return folder


def write_original(files: ModelFiles, folder: Path) -> None:
    for expert in ("high_noise", "low_noise"):
        model = build_expert(files, expert, "fp32", Ranks("cpu"))
        place = folder / f"{expert}_model"
        checkpoint.save(model, place / "whole.safetensors", network="dit", layout="original")
        split_into_shards(place / "whole.safetensors")
    checkpoint.save(
        build_umt5(files, "fp32", Ranks("cpu")),
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
        network="umt5",
        layout="original",
    )
    checkpoint.save(build_vae(files, "cpu"), folder / "Wan2.1_VAE.pth", network="vae", layout="original")
    (folder / "google/umt5-xxl").mkdir(parents=True)
    shutil.copy(files.tokenizer, folder / "google/umt5-xxl/tokenizer.json")
    (folder / "wanfast.json").write_text(json.dumps(files.spec.to_json()))


def split_into_shards(whole: Path, count: int = 3) -> None:
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for k in range(count):
        shard = f"diffusion_pytorch_model-{k + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name].clone() for name in names[k::count]}
        save_file(part, whole.parent / shard)
        weight_map |= dict.fromkeys(part, shard)
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


@pytest.fixture
def plan_for(tmp_path: Path):
    """Returns a plan at WAN_SPEC's test size: a 97x61 picture, area 96x64, 9 frames, 6 steps, unequal guidance.

    With `has_last`, another picture is given for the last frame.
    """
    pictures = [tmp_path / name for name in ("picture.png", "last.png")]
    for seed, picture in enumerate(pictures):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((97, 61), Image.Resampling.BICUBIC).save(picture)

    def make(model: Path, *, has_last: bool = False, **options: object) -> tuple[Plan, ModelFiles]:
        given = {
            "model": str(model),
            "image": str(pictures[0]),
            "last_image": str(pictures[1]) if has_last else None,
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "size": "96x64",
            "frames": 9,
            "steps": 6,
            "guidance_high_noise": 2.0,
            "guidance_low_noise": 3.5,
            "seed": 7,
            "precision": "fp32",
            "device": "cpu",
            "output": str(tmp_path / "out.mp4"),
            "artifacts_dir": str(tmp_path / "artifacts"),
        } | options
        return resolve(given)

    return make


@torch.inference_mode()
def our_latents(plan: Plan, files: ModelFiles) -> torch.Tensor:
    config = plan.config
    ranks = Ranks("cpu")
    texts = [config.video.prompt, config.video.negative_prompt]
    embeds = prompt_embeds(texts, files, config, ranks, Stopwatch("cpu")).embeds
    pipeline = loading.load_models(files, config, ranks, Stopwatch("cpu"))
    condition = pipeline.encode_condition(given_images(plan), plan.geometry)
    noise = next(pipeline.noises(plan))
    text = {"prompt": embeds[config.video.prompt], "negative_prompt": embeds[config.video.negative_prompt]}
    return pipeline.denoise(plan, noise, condition, text, plan.residuals(), lambda index, expert: None)


@torch.inference_mode()
def their_latents(public: WanImageToVideoPipeline | WanPipeline, plan: Plan) -> torch.Tensor:
    config, g = plan.config, plan.geometry
    set_timesteps = type(public.scheduler).set_timesteps
    levels = np.linspace(float(np.float32(0.999)), 0, config.video.steps + 1)[:-1]
    public.scheduler.set_timesteps = lambda num_inference_steps, device=None: set_timesteps(
        public.scheduler, sigmas=levels, device=device
    )
    given = given_images(plan)
    of_image = {name: given[k : k + 1] for k, name in enumerate(("image", "last_image")) if k < len(given)}
    public.set_progress_bar_config(disable=True)
    return public(
        **of_image,
        prompt=config.video.prompt,
        negative_prompt=config.video.negative_prompt,
        height=g.height,
        width=g.width,
        num_frames=g.frames,
        num_inference_steps=config.video.steps,
        guidance_scale=config.video.guidance_high_noise,
        guidance_scale_2=config.video.guidance_low_noise,
        latents=next(draw_noises(config.video.seed, g, 16, "cpu")),
        output_type="latent",
    ).frames


@pytest.fixture(scope="module")
def public_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanPipeline, Path]:
    """Writes a model that makes videos from text alone."""
    folder = tmp_path_factory.mktemp("model") / "text"
    return save_diffusers(folder, takes_images=False), folder


@pytest.mark.parametrize("has_last", [False, True], ids=["first frame", "first and last frame"])
def test_final_latents_equal_diffusers(public, plan_for, has_last: bool) -> None:
    plan, files = plan_for(public[1], has_last=has_last)
    assert plan_json(plan)["steps"] == {"high_noise": 3, "low_noise": 3}
    error = relative_error(our_latents(plan, files), their_latents(public[0], plan))
    print(f"pipeline, {plan.geometry.width}x{plan.geometry.height}, 6 steps, 3 + 3: relative error {error:.1e}")
    assert error <= 1e-5


def test_final_latents_of_text_alone_equal_diffusers(public_text, plan_for) -> None:
    """The shift comes from the published model's facts. The boundary comes from the folder, and equals theirs."""
    plan, files = plan_for(public_text[1], image=None, steps=8)
    assert (plan.geometry.width, plan.geometry.height) == (96, 64)  # exactly --size
    assert (plan.config.video.shift, files.spec.boundary) == (T2V_A14B.shift, T2V_A14B.boundary) == (12.0, 0.875)
    assert plan_json(plan)["steps"] == {"high_noise": 6, "low_noise": 2}
    error = relative_error(our_latents(plan, files), their_latents(public_text[0], plan))
    print(f"pipeline, {plan.geometry.width}x{plan.geometry.height}, 8 steps, 6 + 2: relative error {error:.1e}")
    assert error <= 1e-5


def test_a_last_image_changes_the_latents(public, plan_for) -> None:
    first, both = (our_latents(*plan_for(public[1], has_last=has_last)) for has_last in (False, True))
    assert relative_error(both, first) > 1e-2


def test_both_layouts_give_the_same_latents(public, original_layout: Path, plan_for) -> None:
    ours = our_latents(*plan_for(public[1]))
    plan, files = plan_for(original_layout)
    assert files.layout == "original" and len(files.weights("high_noise")) == 3
    for expert in ("high_noise", "low_noise"):
        pairs = [build_expert(f, expert, "fp32", Ranks("cpu")).state_dict() for f in (files, plan_for(public[1])[1])]
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[1])
    # equal weights at other offsets of their files: the CPU's kernels round unaligned rows differently
    assert relative_error(our_latents(plan, files), ours) <= 1e-5


def test_the_tiny_model_loads_in_either_layout(tmp_path: Path) -> None:
    files = model_files.locate("tiny", "artifacts")
    write_original(files, tmp_path)
    original = model_files.locate(str(tmp_path), "artifacts")
    assert (original.layout, original.spec) == ("original", files.spec)
    for build in (
        lambda f: build_expert(f, "high_noise", "bf16", Ranks("cpu")),
        lambda f: build_expert(f, "low_noise", "bf16", Ranks("cpu")),
        lambda f: build_umt5(f, "bf16", Ranks("cpu")),
        lambda f: build_vae(f, "cpu"),
    ):
        ours, theirs = build(files).state_dict(), build(original).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_two_guidance_scales_are_not_interchangeable(public, plan_for) -> None:
    ours = our_latents(*plan_for(public[1]))
    swapped = our_latents(*plan_for(public[1], guidance_high_noise=3.5, guidance_low_noise=2.0))
    assert relative_error(swapped, ours) > 1e-2


def test_spec_is_read_from_the_public_config_files(public) -> None:
    spec = model_files.locate(str(public[1]), "artifacts").spec
    assert (spec.dit.dim, spec.dit.num_layers, spec.vae.base_dim, spec.umt5.attention_dim) == (96, 3, 8, 64)
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_calls_do_not_touch_each_other(public, plan_for) -> None:
    plan, files = plan_for(public[1], steps=2)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, plan.geometry.height, plan.geometry.width, generator=generator)
    text = {name: torch.randn(4, 24, generator=generator) for name in ("prompt", "negative_prompt")}
    first = frames_of(pipeline, plan, image, text)
    frames_of(pipeline, plan, -image, text)
    assert np.array_equal(frames_of(pipeline, plan, image, text), first)
    assert first.shape == (9, plan.geometry.height, plan.geometry.width, 3)
