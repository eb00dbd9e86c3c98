"""Tests the way of the decoded frames: bytes on the device, handed on while later frames are decoded."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import relative_error
from tests.small_model import plan_small_model
from wanfast.quality.metrics import psnr
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading, pixels
from wanfast.runtime.engine import pipeline as pipeline_module
from wanfast.runtime.engine.conditioning import given_clip
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.errors import NotFiniteError
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_vae
from wanfast.runtime.weights.experts import ResidentExperts


@pytest.fixture
def opened(small_model: Path, workdir: Path) -> tuple[VideoPipeline, Plan, torch.Tensor]:
    """Returns a pipeline, a plan of 9 frames, which are decoded in three pieces, and a latent."""
    plan, files = plan_small_model(small_model, frames=9)
    g = plan.geometry
    latent = torch.randn(1, 16, g.latent_frames, g.latent_height, g.latent_width)
    return loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu")), plan, latent


def test_frames_are_handed_on_while_later_ones_are_decoded(
    opened: tuple[VideoPipeline, Plan, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, plan, latent = opened
    with torch.inference_mode():
        expected = pixels.to_uint8(pipeline.vae.decode(latent)[0])
    events: list[str] = []
    handed: list[np.ndarray] = []
    decode = WanVAE._decode

    def decoding(self: WanVAE, *arguments: Any) -> torch.Tensor:
        events.append("decode")
        return decode(self, *arguments)

    def on_frames(frames: np.ndarray) -> None:
        events.append("frames")
        handed.append(frames.copy())

    monkeypatch.setattr(WanVAE, "_decode", decoding)
    frames = pipeline.frames(latent, plan.geometry, Stopwatch("cpu"), on_frames)
    assert events == ["decode", "decode", "frames", "decode", "frames", "frames"]
    assert np.array_equal(frames, expected) and np.array_equal(np.concatenate(handed), expected)
    assert [len(part) for part in handed] == [1, 4, 4]


def test_memory_that_runs_out_hands_no_frame_on_twice(
    opened: tuple[VideoPipeline, Plan, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, plan, latent = opened
    expected = pipeline.frames(latent, plan.geometry, Stopwatch("cpu"))
    calls, decode = iter(range(100)), WanVAE._decode

    def failing(self: WanVAE, *arguments: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no memory for the third piece")
        return decode(self, *arguments)

    monkeypatch.setattr(WanVAE, "_decode", failing)
    monkeypatch.setattr(pipeline_module, "free_bytes", lambda device: 1 << 30)
    handed: list[np.ndarray] = []
    pipeline.frames(latent, plan.geometry, Stopwatch("cpu"), lambda frames: handed.append(frames.copy()))
    assert next(calls) == 6  # three pieces, of which the last failed, and three again
    assert np.array_equal(np.concatenate(handed), expected)


@pytest.mark.parametrize(
    ("free", "freed_by_garbage", "events"),
    [(60 << 30, 0, []), (0, 60 << 30, ["collect"]), (0, 0, ["collect", "evict", "collect"])],
    ids=["enough memory", "garbage holds enough", "too little memory"],
)
def test_garbage_is_collected_only_if_memory_is_missing_and_before_weights_are_evicted(
    opened: tuple[VideoPipeline, Plan, torch.Tensor], monkeypatch: pytest.MonkeyPatch, free: int,
    freed_by_garbage: int, events: list[str],
) -> None:  # fmt: skip
    """A collection takes tenths of a second, in which the GPU waits."""
    pipeline, plan, latent = opened
    found: list[str] = []
    evict = ResidentExperts.evict
    monkeypatch.setattr(gc, "collect", lambda: found.append("collect"))
    monkeypatch.setattr(ResidentExperts, "evict", lambda self, size: found.append("evict") or evict(self, size))
    monkeypatch.setattr(pipeline_module, "free_bytes", lambda device: free + ("collect" in found) * freed_by_garbage)
    pipeline.frames(latent, plan.geometry, Stopwatch("cpu"))
    assert found == events


def test_a_piece_that_is_not_finite_is_not_handed_on(
    opened: tuple[VideoPipeline, Plan, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, plan, latent = opened
    latent[:, :, 1] = torch.nan
    handed: list[int] = []
    with pytest.raises(NotFiniteError, match="the decoded video"):
        pipeline.frames(latent, plan.geometry, Stopwatch("cpu"), lambda frames: handed.append(len(frames)))
    assert handed == [1]


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_condition_is_that_of_the_whole_clip(
    opened: tuple[VideoPipeline, Plan, torch.Tensor], num_images: int
) -> None:
    """The grey frames are not encoded again and again; this changes no bit."""
    pipeline, plan, _ = opened
    geometry = dataclasses.replace(plan.geometry, frames=81)
    images = torch.rand(num_images, 3, geometry.height, geometry.width)
    with torch.inference_mode():
        condition = pipeline.encode_condition(images, geometry)
        assert torch.equal(condition[:, 4:], pipeline.vae.encode(given_clip(images, 81)).float())


def test_the_tiny_model_decodes_in_bf16() -> None:
    files = model_files.locate("tiny", "")
    exact, half = build_vae(files, "cpu"), build_vae(files, "cpu", "bf16")
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        latents = half.encode(given_clip(image[None], 17))
        assert relative_error(latents, exact.encode(given_clip(image[None], 17))) == 0
        likeness = psnr(half.decode(latents)[0], exact.decode(latents)[0])
    print(f"decoded in bf16: {likeness:.1f} dB")
    assert likeness >= 45
