"""Tests the VAE's passes against float64, as formulas and as Triton kernels; without a GPU, Triton interprets them."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.parity import relative_error
from wanfast.runtime.models import vae_fused

LAYOUT = torch.channels_last_3d
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=["formula", "kernel"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "kernel":
        kernels = importlib.import_module("wanfast.runtime.models.vae_kernels")
        monkeypatch.setattr(vae_fused, "vae_kernels", kernels, raising=False)
    monkeypatch.setattr(vae_fused, "_by_kernel", lambda x: request.param == "kernel")
    return vae_fused


def clip_of(channels: int, dtype: torch.dtype, frames: int = 2, height: int = 5, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn((1, channels, frames, height, width), generator=generator).to(dtype)
    return x.contiguous(memory_format=LAYOUT)


def exact_norm(x: Tensor, gamma: Tensor) -> Tensor:
    x, gamma = x.double(), gamma.double()
    return x / x.square().mean(1, keepdim=True).sqrt() * gamma


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("channels", [3, 96])
@torch.no_grad()
def test_rms_norm(passes: ModuleType, channels: int, dtype: torch.dtype) -> None:
    x, gamma = clip_of(channels, dtype), torch.linspace(0.5, 2, channels, dtype=dtype).view(-1, 1, 1, 1)
    exact = exact_norm(x, gamma)
    assert relative_error(passes.rms_norm(x, gamma), exact) <= ROUNDING[dtype]
    out = torch.zeros((1, channels + 5, 4, 5, 7), dtype=dtype).contiguous(memory_format=LAYOUT)
    passes.rms_norm_silu_into(out[:, :, 2:], x, gamma)
    assert relative_error(out[:, :channels, 2:], exact * torch.sigmoid(exact)) <= ROUNDING[dtype]
    assert not out[:, channels:].any() and not out[:, :, :2].any()  # nothing else is written


@torch.no_grad()
def test_a_position_of_zeros_stays_zero(passes: ModuleType) -> None:
    assert not passes.rms_norm(torch.zeros_like(clip_of(8, torch.float32)), torch.ones(8, 1, 1, 1)).any()


@pytest.mark.parametrize("rate", [1, 2])
@torch.no_grad()
def test_upsample(passes: ModuleType, rate: int) -> None:
    x = clip_of(rate * 12, torch.float32, frames=3, width=70)
    out = passes.upsample(x, rate)
    assert out.shape == (1, 12, 3 * rate, 10, 140)
    for frame in range(3 * rate):
        part = x[0, frame % rate * 12 :][:12, frame // rate]
        assert torch.equal(out[0, :, frame], part.repeat_interleave(2, 1).repeat_interleave(2, 2))


@torch.no_grad()
def test_kernels_refuse_other_layouts() -> None:
    """They would read or write other values without an error."""
    kernels = importlib.import_module("wanfast.runtime.models.vae_kernels")
    x, gamma = clip_of(8, torch.float32), torch.ones(8)
    last = vae_fused._positions(x)
    first = vae_fused._positions(x.clone(memory_format=torch.contiguous_format))
    for given in ((first, last), (last, first)):
        with pytest.raises(AssertionError, match="channels of a position must be adjacent"):
            kernels.rms_norm(*given, gamma, False)
    with pytest.raises(RuntimeError, match="view size"):  # a copy, into which a kernel would write for nothing
        vae_fused._positions(x[..., :-1])
    frames, out = (clip.permute(0, 2, 3, 4, 1)[0] for clip in (x, clip_of(8, torch.float32, 2, 10, 14)))
    padded = clip_of(12, torch.float32, 2, 10, 14)[:, :8].permute(0, 2, 3, 4, 1)[0]
    for given in ((frames.transpose(1, 2), out), (frames, padded)):
        with pytest.raises(AssertionError, match="frames must be contiguous"):
            kernels.upsample(*given, 1)
