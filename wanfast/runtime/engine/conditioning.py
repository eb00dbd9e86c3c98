"""Makes the inputs of the denoising loop: the noise, and the condition that contains the given frames.

Shapes: F frames of H x W pixels; T latent frames of h x w; C latent channels.
Source: Wan-Video/Wan2.2, wan/image2video.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wanfast.runtime.facts.shapes import Geometry


def given_clip(images: Tensor, frames: int) -> Tensor:
    """Returns the clip [1, 3, F, H, W] that the VAE encodes: the first of `images` [n, 3, H, W], then mid-grey frames.

    If there is a second image, it is the last frame.
    """
    clip = images.new_zeros(1, images.shape[1], frames, *images.shape[2:])
    for frame, image in zip((0, -1), images, strict=False):
        clip[:, :, frame] = image
    return clip


def with_mask(latents: Tensor, num_mask_channels: int, *, last: bool = False) -> Tensor:
    """Returns the condition y [1, M + C, T, h, w]: M mask channels, then the `latents` [1, C, T, h, w].

    M is `num_mask_channels`. The mask is 1 in the first latent frame, because the image gives this frame, and 0 in the
    others. If the video's last frame is given too (`last`), the last mask channel of the last latent frame is also 1:
    a latent frame stands for M video frames, and each mask channel for one of them.
    """
    mask = torch.zeros_like(latents[:, :num_mask_channels])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return torch.cat((mask, latents), dim=1)


def draw_noises(seed: int, geometry: Geometry, channels: int, device: str) -> Iterator[Tensor]:
    """Yields the noises of a video without end: standard normal, [1, C, T, h, w] in float32.

    Denoising starts from the first noise. With `device` "cpu", a seed gives the same noises on every machine.
    """
    generator = torch.Generator(device).manual_seed(seed)
    while True:
        yield torch.randn(noise_shape(geometry, channels), generator=generator, device=generator.device)


def noise_shape(geometry: Geometry, channels: int) -> tuple[int, int, int, int, int]:
    """Returns the shape (1, C, T, h, w) of the noise; the latent has this shape too, after every step."""
    return 1, channels, geometry.latent_frames, geometry.latent_height, geometry.latent_width
