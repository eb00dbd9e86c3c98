"""Trains the VAE: stage 1 on short windows of clips, stage 2 the decoder only, on windows as long as a clip.

The loss is L1 + 20 x squared error; latents stay near unit size, and noise on them makes the decoder robust. Stage 1
uses windows of nine frames, from which the decoder does not extrapolate well in every clip. So stage 2 trains the
decoder on whole clips and leaves the latents unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.loop import Batch, DrawFn, LossFn, Schedule, initialise, load_ema, train
from wanfast.quality.world import FRAMES, SIZE, Renderer, draw_scene, moments_of_clip
from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models.vae import WanVAE

# Training does not normalise latents; `measure_latents` measures their mean and standard deviation afterwards.
PLAIN = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}
_LATENT_NOISE = 0.03


def build(spec: VAESpec, device: str) -> WanVAE:
    vae = WanVAE(replace(spec, **PLAIN))
    initialise(vae, seed=1)
    vae.to(device)
    if device == "cuda":
        for parameter in vae.parameters():
            if parameter.dim() == 5:  # cuDNN's 3-D convolutions are fastest in this layout
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def fit(spec: VAESpec, schedule: Schedule, folder: Path, device: str, batch: int, side: int, frames: int) -> bool:
    vae = build(spec, device)
    return train("vae", vae, windows(spec, Renderer(device), batch, side, frames), vae_loss(vae), schedule, folder)


class Decoder(nn.Module):
    """Holds the parts of a VAE that stage 2 trains; all others are frozen."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        vae.requires_grad_(False)
        self.parts = nn.ModuleList((vae.decoder, vae.post_quant_conv)).requires_grad_(True)


def fit_decoder(spec: VAESpec, schedule: Schedule, folder: Path, device: str, batch: int, side: int) -> bool:
    vae = build(spec, device)
    load_ema(vae, folder / "vae.pt")
    draw = windows(spec, Renderer(device), batch, side, FRAMES)
    return train("decoder", Decoder(vae), draw, vae_loss(vae), schedule, folder)


def windows(spec: VAESpec, renderer: Renderer, batch: int, side: int, frames: int) -> DrawFn:
    """Returns a function that draws `batch` windows at a random place and time, and noise for their latents.

    A window has side x side pixels and `frames` frames.
    """
    latent_frames, latent_side = (frames - 1) // spec.temporal_stride + 1, side // spec.spatial_stride
    shape = (batch, spec.latent_channels, latent_frames, latent_side, latent_side)

    def draw(step: int, generator: torch.Generator) -> Batch:
        where = torch.Generator().manual_seed(step)
        left, top = (int(torch.randint(0, SIZE - side + 1, (), generator=where)) for _ in range(2))
        first = int(torch.randint(0, FRAMES - frames + 1, (), generator=where))
        scenes = [draw_scene(step * batch + k) for k in range(batch)]
        video = renderer(scenes, moments_of_clip()[first : first + frames], (left, top, side))
        return video, torch.randn(shape, generator=generator, device=renderer.device)

    return draw


def vae_loss(vae: WanVAE) -> LossFn:
    """Returns the reconstruction loss of a batch of windows."""

    def loss(video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.device.type == "cuda"):
            z = encode(vae, video)
            out = decode(vae, z + _LATENT_NOISE * noise).float()
        error = out - video
        squared = (error / 2).square().mean()
        size = z.float().square().mean()
        total = error.abs().mean() + 20 * squared + 1e-3 * (size - 1).clamp_min(0)
        return {"loss": total, "psnr": -10 * squared.log10(), "latent": size}

    return loss


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """Encodes in two chunks: the first frame, then all others at once."""
    first, past = vae.encode_chunk(video[:, :, :1], None)
    rest, _ = vae.encode_chunk(video[:, :, 1:], past)
    return torch.cat((first, rest), dim=2)


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    first, past = vae.decode_chunk(latents[:, :, :1], None)
    rest, _ = vae.decode_chunk(latents[:, :, 1:], past)
    return torch.cat((first, rest), dim=2)


def load(spec: VAESpec, folder: Path, device: str) -> WanVAE:
    vae = build(spec, device)
    load_ema(vae, folder / "vae.pt")
    if (folder / "decoder.pt").exists():
        load_ema(Decoder(vae), folder / "decoder.pt")
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def measure_latents(vae: WanVAE, renderer: Renderer, clips: int = 64) -> VAESpec:
    """Returns the spec with each latent channel's mean and standard deviation, measured over whole clips."""
    latents = torch.cat(
        [
            encode(vae, renderer([draw_scene(1_000_000 + k + j) for j in range(8)], moments_of_clip()))
            for k in range(0, clips, 8)
        ]
    ).float()
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    rounded = [tuple(round(float(x), 4) for x in values) for values in (mean, std)]
    return replace(vae.spec, latents_mean=rounded[0], latents_std=rounded[1])


@torch.no_grad()
def held_out_psnr(vae: WanVAE, renderer: Renderer, clips: int = 64) -> float:
    """Returns the PSNR in decibels of reconstructed held-out clips, averaged over the clips."""
    values = []
    for k in range(clips):
        video = renderer([draw_scene(k, held_out=True)], moments_of_clip())
        squared = ((decode(vae, encode(vae, video)) - video) / 2).square().mean()
        values.append(-10 * squared.log10())
    return float(torch.stack(values).mean())
