"""Tests what the VAE does on a GPU alone: cuDNN's engines, our Triton kernels, and the decoder in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.quality.metrics import psnr
from wanfast.runtime.device import hardware
from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models import convolution, vae_fused
from wanfast.runtime.models.convolution import Triple, convolve
from wanfast.runtime.models.vae import WanVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LAYOUT = torch.channels_last_3d
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 4e-3}  # of TF32's and bf16's inputs


@pytest.fixture(autouse=True)
def _as_a_run_does() -> Iterator[None]:
    hardware.prepare("cuda", "bf16", None)
    with torch.inference_mode():
        yield


def random_convolution(
    inputs: int, outputs: int, kernel: Triple, grid: Triple, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, weight = draw(1, inputs, *grid), draw(outputs, inputs, *kernel) / (inputs * 27) ** 0.5
    return x.contiguous(memory_format=LAYOUT), weight, draw(outputs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding"),
    [
        (96, 96, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
        (96, 3, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
        (32, 64, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
        (32, 16, (1, 3, 3), (1, 2, 2), (0, 0, 0)),
        (16, 32, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ],
)
def test_convolve_is_the_exact_sum(
    inputs: int, outputs: int, kernel: Triple, stride: Triple, padding: Triple, dtype: torch.dtype
) -> None:
    x, weight, bias = random_convolution(inputs, outputs, kernel, (5, 33, 35), dtype)
    exact = F.conv3d(x.double(), weight.double(), bias.double(), stride, padding)
    got = convolve(x, weight, bias, stride=stride, padding=padding)
    error = relative_error(got, exact)
    print(f"{dtype} {inputs} to {outputs}: {error:.1e}")
    assert got.shape == exact.shape and error < TOLERANCES[dtype]


@pytest.mark.skipif(not convolution.HAS_FRONT_END, reason="cuDNN's front end is not installed")
def test_a_kept_choice_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random_convolution(96, 192, (3, 3, 3), (6, 40, 64), torch.bfloat16)
    monkeypatch.setattr(convolution, "_chosen", {})
    monkeypatch.setattr(convolution, "_graphs", {})
    first = convolve(x, weight, bias, padding=(0, 1, 1))
    kept = convolution.chosen()
    assert len(kept) == 1 and set(kept.values()) != {"torch"}
    monkeypatch.setattr(convolution, "_chosen", {})
    monkeypatch.setattr(convolution, "_graphs", {})
    monkeypatch.setattr(convolution, "_seconds", None)  # a search would fail
    convolution.choose(kept)
    assert torch.equal(convolve(x, weight, bias, padding=(0, 1, 1)), first)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels", [3, 96, 384])
def test_the_kernels_are_their_formulas(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, channels, 3, 18, 22, device="cuda", dtype=dtype).contiguous(memory_format=LAYOUT)
    gamma = torch.randn(channels, 1, 1, 1, device="cuda", dtype=dtype)
    out = torch.zeros(1, channels + 5, 5, 18, 22, device="cuda", dtype=dtype).contiguous(memory_format=LAYOUT)
    vae_fused.rms_norm_silu_into(out[:, :, 2:], x, gamma)
    exact = x.double() / x.double().square().mean(1, keepdim=True).sqrt() * gamma.double()
    assert relative_error(out[:, :channels, 2:], exact * exact.sigmoid()) < TOLERANCES[dtype]
    assert not out[:, channels:].any() and not out[:, :, :2].any()
    assert relative_error(vae_fused.rms_norm(x, gamma), exact) < TOLERANCES[dtype]
    apart = torch.randn(1, 2 * channels, 3, 18, 70, device="cuda", dtype=dtype).contiguous(memory_format=LAYOUT)
    by_torch = vae_fused.upsample(apart.cpu(), 2)
    assert torch.equal(vae_fused.upsample(apart, 2).cpu(), by_torch)


def test_a_video_is_decoded_in_bf16_and_its_image_encoded_by_less_work() -> None:
    spec = VAESpec(base_dim=32)
    exact, half = WanVAE(spec), WanVAE(spec, torch.bfloat16)
    randomise(exact, 0)
    exact.decoder.conv_out.weight.data *= 0.2
    half.load_state_dict(exact.state_dict())
    for vae in (exact, half):
        vae.lay_out()
        vae.requires_grad_(False).cuda()
    clip = torch.zeros(1, 3, 41, 96, 160, device="cuda")
    clip[:, :, 0] = torch.rand(3, 96, 160, device="cuda") * 2 - 1
    latents = half.encode(clip, still_from=1)
    assert torch.equal(latents, half.encode(clip))
    video = half.decode(latents)
    assert torch.equal(video, half.decode(latents))
    hardware.prepare("cuda", "fp32", None)
    likeness = psnr(video[0].cpu(), exact.decode(latents)[0].cpu())
    print(f"decoded in bf16: {likeness:.1f} dB")
    assert likeness > 45
    cpu = WanVAE(spec)
    cpu.load_state_dict(exact.state_dict())
    assert relative_error(exact.encode(clip).cpu(), cpu.encode(clip.cpu())) < 1e-4
