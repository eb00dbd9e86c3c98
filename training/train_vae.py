"""Trains the VAE in three stages: on short windows of clips, on windows as long as a clip, and the decoder again.

The loss is L1 + 100 x squared error, and a small penalty on latents that are larger than unit size. Noise is added to
the latents, so that the decoder becomes robust. The first stage learns faster, but it sees nine frames at a time, and
neither encoder nor decoder extrapolates to later frames. The third stage does not change the encoder, so experts that
learned from its latents stay valid. Windows are rendered before the first step, because rendering a batch takes as long
as a step of training. `finish` writes the file for the next stage: the averaged weights and the statistics of the
latents.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from training.clips import LARGE, SMALL, Format, Mix
from training.loop import Batch, DrawFn, LossFn, Schedule, initialise, load_ema, save, train
from wanfast.quality.world import Scene
from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models.vae import (
    WHOLE_FRAME,
    Downsample,
    PastQueue,
    Upsample,
    WanVAE,
    convolve_frames,
    latent_statistics,
)
from wanfast.runtime.models.vae_fused import upsample
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.builders import build_vae

# Training does not normalise latents; `measure_latents` measures their mean and standard deviation afterwards.
PLAIN = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}
SHORT_STAGE, LONG_STAGE, DECODER_STAGE = "vae-short", "vae-long", "vae-decoder"
FINISHED = "vae-finished.pt"
_LATENT_NOISE = 0.03


@dataclass(frozen=True)
class Windows:
    """Describes one kind of windows: parts of clips with side x side pixels and `frames` frames.

    `form` is the format of the clips. `count` windows are rendered, and a step takes `batch` windows.
    """

    batch: int
    side: int
    frames: int
    form: Format
    count: int

    def latents(self, spec: VAESpec) -> tuple[int, ...]:
        side = self.side // spec.spatial_stride
        return self.batch, spec.latent_channels, (self.frames - 1) // spec.temporal_stride + 1, side, side


# Steps take these in turn. All have about as many pixels.
SHORT = (
    Windows(32, 64, 9, SMALL[0], 12_800),
    Windows(8, 128, 9, SMALL[0], 3_200),
    Windows(32, 64, 9, LARGE[0], 12_800),
    Windows(2, 256, 9, LARGE[0], 800),
)
LONG = (
    Windows(16, 64, 17, SMALL[0], 6_400),
    Windows(4, 128, 17, SMALL[0], 1_600),
    Windows(8, 64, 33, LARGE[0], 3_200),
    Windows(1, 256, 17, LARGE[0], 400),
)
DECODER = tuple(replace(kind, count=kind.count // 2) for kind in LONG)
TOY = (Windows(1, 16, 5, Format((16, 16), 5), 3), Windows(1, 32, 5, Format((32, 32), 5), 3))


def build(spec: VAESpec, device: str) -> WanVAE:
    vae = WanVAE(replace(spec, **PLAIN))
    initialise(vae, seed=1)
    vae.to(device)
    if device.startswith("cuda"):
        vae.lay_out()
    return vae


def fit(
    spec: VAESpec, pools: Sequence[Tensor], schedule: Schedule, folder: Path, kinds: Sequence[Windows], stage: str
) -> bool:
    vae = build(spec, str(pools[0].device))
    if stage == LONG_STAGE:
        load_ema(vae, folder / f"{SHORT_STAGE}.pt")
    if stage == DECODER_STAGE:
        load_ema(vae, folder / FINISHED)
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    return train(stage, vae, windows(spec, pools, kinds), vae_loss(vae), schedule, folder)


def render(mix: Mix, kind: Windows, number: int) -> Tensor:
    """Renders the windows of a kind from scene `number` on, each batch at a random place and time.

    Returns bytes [count, 3, frames, side, side].
    """
    where, (width, height) = random.Random(f"window/{number}"), kind.form.size
    found = []
    for start in range(number, number + kind.count, kind.batch):
        left, top = where.randint(0, width - kind.side), where.randint(0, height - kind.side)
        first = where.randint(0, kind.form.frames - kind.frames)
        scenes = [mix.scene(start + k, kind.form.size) for k in range(min(kind.batch, number + kind.count - start))]
        video = mix.render(scenes, kind.form, (left, top, kind.side), slice(first, first + kind.frames))
        found.append(((video + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(found)


def windows(spec: VAESpec, pools: Sequence[Tensor], kinds: Sequence[Windows]) -> DrawFn:
    """Returns a function that draws a batch of windows, half of them mirrored, and noise for their latents."""

    def draw(step: int, generator: torch.Generator) -> Batch:
        kind, pool = kinds[step % len(kinds)], pools[step % len(kinds)]
        drawn = partial(torch.rand, kind.batch, generator=generator, device=pool.device)
        video = pool[(drawn() * len(pool)).long()].float() / 127.5 - 1
        video = torch.where(drawn().view(-1, 1, 1, 1, 1) < 0.5, video, video.flip(-1))
        return video, torch.randn(kind.latents(spec), generator=generator, device=pool.device)

    return draw


def vae_loss(vae: WanVAE) -> LossFn:
    """Returns a function that computes the loss of a batch of windows, with their PSNR in decibels."""

    def loss(video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.device.type == "cuda"):
            z = encode(vae, video)
            out = decode(vae, z + _LATENT_NOISE * noise).float()
        error = out - video
        squared = (error / 2).square().mean()
        size = z.float().square().mean()
        total = error.abs().mean() + 100 * squared + 1e-2 * (size - 1).clamp_min(0)
        return {"loss": total, "psnr": -10 * squared.log10(), "latent": size}

    return loss


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """Encodes whole clips [B, 3, F, H, W] at once; returns the latents [B, C, T, h, w] of `WanVAE.encode`.

    Training uses this function, because it needs fewer and larger kernels than the chunks of `WanVAE.encode`.
    """
    encoder, x = vae.encoder, video
    for layer in (encoder.conv_in, *encoder.downsamples, *encoder.middle):
        x = layer(x, _no_past(), WHOLE_FRAME)
        if isinstance(layer, Downsample) and layer.time_conv is not None:
            x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
    moments = vae.quant_conv(encoder.conv_out(x, _no_past(), WHOLE_FRAME, encoder.norm_out))
    mean, inverse_std = latent_statistics(vae.spec, video.device)
    return (moments.chunk(2, dim=1)[0] - mean) * inverse_std


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Decodes whole clips at once, from latents [B, C, T, h, w] to [B, 3, F, H, W] in [-1, 1]."""
    mean, inverse_std = latent_statistics(vae.spec, latents.device)
    decoder, x = vae.decoder, vae.post_quant_conv(latents / inverse_std + mean)
    for layer in (decoder.conv_in, *decoder.middle, *decoder.upsamples):
        if isinstance(layer, Upsample) and layer.time_conv is not None:
            doubled = layer.time_conv(x[:, :, 1:], _no_past(), WHOLE_FRAME)
            x = torch.cat((upsample(x[:, :, :1], 1), upsample(doubled, 2)), dim=2)
            x = convolve_frames(x, layer.resample)
        else:
            x = layer(x, _no_past(), WHOLE_FRAME)
    return decoder.conv_out(x, _no_past(), WHOLE_FRAME, decoder.norm_out).float().clamp(-1, 1)


def _no_past() -> PastQueue:
    """Returns the past of a clip's first chunk, for any one layer."""
    return deque((None, None))


def load(spec: VAESpec, folder: Path, device: str) -> WanVAE:
    """Returns the trained VAE: the finished VAE if it exists, otherwise the latest checkpoint.

    Its spec has mean 0 and deviation 1 for all latents, in place of the measured statistics.
    """
    vae = build(spec, device)
    files = [folder / name for name in (FINISHED, f"{LONG_STAGE}.pt", f"{SHORT_STAGE}.pt")]
    load_ema(vae, next((file for file in files if file.exists()), files[-1]))
    return vae.requires_grad_(False).eval()


def finish(spec: VAESpec, mix: Mix, folder: Path, clips: int) -> None:
    """Writes the averaged weights, in bf16 as they will ship, and the latents' statistics to FOLDER/vae-finished.pt."""
    vae = load(spec, folder, mix.device)
    weights = {"ema": [parameter.detach().bfloat16() for parameter in vae.parameters()]}
    for parameter, value in zip(vae.parameters(), weights["ema"], strict=True):
        parameter.copy_(value)
    measured = measure_latents(vae, mix, clips)
    facts = {"latents_mean": measured.latents_mean, "latents_std": measured.latents_std}
    save({**weights, **facts}, folder / FINISHED)


def take(files: ModelFiles, folder: Path) -> None:
    """Writes the VAE of a trained model, and its latents' statistics, to FOLDER/vae-finished.pt."""
    weights = [parameter.detach().bfloat16() for parameter in build_vae(files, "cpu").parameters()]
    spec = files.spec.vae
    folder.mkdir(parents=True, exist_ok=True)
    save({"ema": weights, "latents_mean": spec.latents_mean, "latents_std": spec.latents_std}, folder / FINISHED)


def finish_decoder(folder: Path) -> None:
    """Writes the decoder of the third stage into FOLDER/vae-finished.pt."""
    trained = torch.load(folder / f"{DECODER_STAGE}.pt", map_location="cpu", weights_only=True)["ema"]
    state = torch.load(folder / FINISHED, map_location="cpu", weights_only=True)
    save({**state, "ema": [value.bfloat16() for value in trained]}, folder / FINISHED)


def finished(spec: VAESpec, folder: Path) -> VAESpec:
    """Returns `spec` with the mean and deviation of the finished VAE's latents, from `folder`/vae-finished.pt."""
    state = torch.load(folder / FINISHED, map_location="cpu", weights_only=True)
    return replace(spec, latents_mean=tuple(state["latents_mean"]), latents_std=tuple(state["latents_std"]))


@torch.no_grad()
def measure_latents(vae: WanVAE, mix: Mix, clips: int) -> VAESpec:
    """Returns the spec with each latent channel's mean and standard deviation, measured over whole small clips."""
    form, latents = SMALL[0], []
    for k in range(clips):
        video = mix.render([mix.scene(1_000_000 + k, form.size)], form)
        latents.append(encode(vae, video).float().flatten(2))
    values = torch.cat(latents, dim=2)
    mean, std = values.mean(dim=(0, 2)), values.std(dim=(0, 2))
    rounded = [tuple(round(float(x), 4) for x in values) for values in (mean, std)]
    return replace(vae.spec, latents_mean=rounded[0], latents_std=rounded[1])


@torch.no_grad()
def psnr(vae: WanVAE, mix: Mix, scenes: list[Scene], form: Format) -> float:
    """Returns the PSNR in decibels of the scenes' reconstructed clips, averaged over the clips."""
    values = []
    for scene in scenes:
        video = mix.render([scene], form)
        squared = ((decode(vae, encode(vae, video)) - video) / 2).square().mean()
        values.append(-10 * squared.log10())
    return float(torch.stack(values).mean())
