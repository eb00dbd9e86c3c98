"""The causal video VAE of Wan 2.1 maps pixels to latents, 4x8x8 smaller, and back, a few frames at a time.

Every convolution over time looks only backwards. So a clip is coded in chunks, and each chunk passes on the frames that
the next chunk's convolutions need. The first frame is its own chunk and makes one latent frame; each later latent frame
represents four frames of video. No module holds state: the *past* is a list of one tensor for each convolution over
time, in the order in which the convolutions run. A chunk takes one such list and returns the next.

Cost at 720x1280, 81 frames: encode 382 TFLOP, decode 639. A full-resolution chunk of 4 frames with 96 channels is
1.4 GB in float32, the past of the decoder 8.7 GB. `encode` and `decode_stream` free each past as they replace it.
Limit: float32 is the reference; FastVideo reports that bfloat16 is harmless in decoding (MS-SSIM 0.9999), not in
encoding.
Source: Wan technical report (arXiv 2503.20314); Wan-Video/Wan2.2 `wan/modules/vae2_1.py` (42bf4cf).

B batch, C channels, F frames of video, T frames (of any rate), H W pixels, Y X latent grid, h w any grid
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanfast.runtime.facts.model_spec import VAESpec

Past: TypeAlias = list[Tensor | None]  # one entry for each convolution over time, in running order
# The past while a chunk runs: each convolution takes its entry from the front and appends the next one.
PastQueue: TypeAlias = deque[Tensor | None]


class WanVAE(nn.Module):
    """Maps video [B,3,F,H,W] in [-1,1] to normalised latents [B,16,T,Y,X] and back; F = 4(T-1)+1, H = 8Y, W = 8X."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.encoder = Encoder(spec, dtype)
        self.quant_conv = nn.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1, dtype=dtype)
        self.post_quant_conv = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1, dtype=dtype)
        self.decoder = Decoder(spec, dtype)

    def encode(self, video: Tensor) -> Tensor:
        """Encodes video [B,3,F,H,W] as float32 latents [B,16,T,Y,X]: the posterior's normalised mean, never a sample.

        Raises ValueError for a size that the strides do not fit.
        """
        frames, height, width = video.shape[2:]
        stride = self.spec.spatial_stride
        if frames % self.spec.temporal_stride != 1 or height % stride or width % stride:
            raise ValueError(
                f"video of {frames} frames, {height}x{width}: frames must be {self.spec.temporal_stride}n+1, "
                f"height and width multiples of {stride}"
            )
        queue = _start(self.encoder)
        chunks = torch.split(video, [1] + [self.spec.temporal_stride] * (frames // self.spec.temporal_stride), dim=2)
        return torch.cat([self._encode(x, queue) for x in chunks], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B,16,T,Y,X] to video [B,3,F,H,W] in [-1,1]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decodes latents [B,16,T,Y,X] and yields T pieces of the video: [B,3,1,H,W], then [B,3,4,H,W] each."""
        queue = _start(self.decoder)
        for z in torch.split(latents, 1, dim=2):
            yield self._decode(z, queue)

    def encode_chunk(self, video: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Encodes the next frames of a clip and returns (1 or n latent frames, the next past).

        The first chunk has 1 frame, and its `past` is None; later chunks have 4n frames. Raises ValueError otherwise.
        """
        frames, stride = video.shape[2], self.spec.temporal_stride
        fits = frames == 1 if past is None else frames % stride == 0
        if not fits:
            raise ValueError(f"a chunk of {frames} frames: the first chunk has 1, the others a multiple of {stride}")
        queue = _start(self.encoder) if past is None else deque(past)
        return self._encode(video, queue), list(queue)

    def decode_chunk(self, latents: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Decodes the next latents of a clip and returns (1 or 4n frames, the next past).

        The first chunk has 1 latent frame, and its `past` is None; later chunks have n. Raises ValueError otherwise.
        """
        if past is None and latents.shape[2] != 1:
            raise ValueError(f"the first chunk has {latents.shape[2]} latent frames: it must have 1")
        queue = _start(self.decoder) if past is None else deque(past)
        return self._decode(latents, queue), list(queue)

    def _encode(self, video: Tensor, queue: PastQueue) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(video.to(self.dtype), queue))
        mean, inverse_std = latent_statistics(self.spec, video.device)
        return (moments.chunk(2, dim=1)[0] - mean) * inverse_std

    def _decode(self, latents: Tensor, queue: PastQueue) -> Tensor:
        mean, inverse_std = latent_statistics(self.spec, latents.device)
        z = self.post_quant_conv((latents / inverse_std + mean).to(self.dtype))
        video: Tensor = self.decoder(z, queue)
        return video.clamp_(-1, 1)


@cache
@torch.inference_mode(False)  # so that training can use the tensors too
def latent_statistics(spec: VAESpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns mean and 1/std, [C,1,1,1] in float32; a module built on meta would lose them as buffers."""
    mean = torch.tensor(spec.latents_mean, dtype=torch.float32, device=device)
    std = torch.tensor(spec.latents_std, dtype=torch.float32, device=device)
    return mean.view(-1, 1, 1, 1), std.reciprocal().view(-1, 1, 1, 1)


class Encoder(nn.Module):
    """Maps video [B,3,T,H,W] to moments [B,2*16,T',Y,X]: the mean, then the log-variance."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype) -> None:
        super().__init__()
        channels = spec.base_dim
        self.conv_in = CausalConv3d(3, channels, dtype=dtype)
        self.downsamples = nn.ModuleList()
        for level, mult in enumerate(spec.dim_mult):
            for _ in range(spec.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, spec.base_dim * mult, dtype))
                channels = spec.base_dim * mult
            if level < len(spec.temporal_downsample):
                self.downsamples.append(Downsample(channels, spec.temporal_downsample[level], dtype))
        self.middle = _middle(channels, dtype)
        self.norm_out = RMSNorm(channels, 3, dtype)
        self.conv_out = CausalConv3d(channels, 2 * spec.latent_channels, dtype=dtype)

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:
        x = self.conv_in(x, past)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, past)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(x), inplace=True), past)
        return moments


class Decoder(nn.Module):
    """Maps latents [B,16,T,Y,X] to video [B,3,T',H,W]."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype) -> None:
        super().__init__()
        channels = spec.base_dim * spec.dim_mult[-1]
        self.conv_in = CausalConv3d(spec.latent_channels, channels, dtype=dtype)
        self.middle = _middle(channels, dtype)
        self.upsamples = nn.ModuleList()
        temporal_upsample = spec.temporal_downsample[::-1]
        for level, mult in enumerate(reversed(spec.dim_mult)):
            for _ in range(spec.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, spec.base_dim * mult, dtype))
                channels = spec.base_dim * mult
            if level < len(temporal_upsample):
                self.upsamples.append(Upsample(channels, temporal_upsample[level], dtype))
                channels //= 2
        self.norm_out = RMSNorm(channels, 3, dtype)
        self.conv_out = CausalConv3d(channels, 3, dtype=dtype)

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:
        x = self.conv_in(x, past)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, past)
        video: Tensor = self.conv_out(F.silu(self.norm_out(x), inplace=True), past)
        return video


class ResidualBlock(nn.Module):
    """Applies norm, SiLU and convolution twice, and adds the input: [B,C,T,h,w] -> [B,C',T,h,w]."""

    def __init__(self, in_channels: int, out_channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, 3, dtype)
        self.conv1 = CausalConv3d(in_channels, out_channels, dtype=dtype)
        self.norm2 = RMSNorm(out_channels, 3, dtype)
        self.conv2 = CausalConv3d(out_channels, out_channels, dtype=dtype)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, dtype=dtype) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x), inplace=True), past)
        h = self.conv2(F.silu(self.norm2(h), inplace=True), past)
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Applies self-attention among the positions of each frame, with one head of all channels; keeps [B,C,T,h,w]."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2, dtype)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, dtype=dtype)
        self.proj = nn.Conv2d(channels, channels, 1, dtype=dtype)

    def forward(self, x: Tensor, _past: PastQueue) -> Tensor:
        batch, height = x.shape[0], x.shape[3]
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (qkv c) h w -> qkv n 1 (h w) c", qkv=3)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
        out: Tensor = self.proj(mixed)
        return x + rearrange(out, "(b t) c h w -> b c t h w", b=batch)


class Downsample(nn.Module):
    """Maps [B,C,T,h,w] to [B,C,T,h/2,w/2]; `temporal` also halves T, except for the first frame of a clip."""

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Conv2d(channels, channels, 3, stride=2, dtype=dtype)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), (2, 1, 1), dtype=dtype) if temporal else None

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:
        frames = F.pad(rearrange(x, "b c t h w -> (b t) c h w"), (0, 1, 0, 1))
        x = rearrange(self.resample(frames), "(b t) c h w -> b c t h w", b=x.shape[0])
        if self.time_conv is None:
            return x
        before = past.popleft()
        past.append(x[:, :, -1:].clone())
        return x if before is None else self.time_conv(torch.cat((before, x), dim=2))


class Upsample(nn.Module):
    """Maps [B,C,T,h,w] to [B,C/2,T,2h,2w]; `temporal` also doubles T, except for the first frame of a clip.

    The convolution over time does not see that first frame: later frames see zeros in its place.
    """

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Conv2d(channels, channels // 2, 3, padding=1, dtype=dtype)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), dtype) if temporal else None

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:
        batch, rate = x.shape[0], 1
        if self.time_conv is not None and past[0] is None:
            past.popleft()
            past.append(torch.zeros_like(x).expand(-1, -1, 2, -1, -1))
        elif self.time_conv is not None:
            x, rate = self.time_conv(x, past), 2
        frames = rearrange(x, "b (r c) t h w -> (b t r) c h w", r=rate)
        out: Tensor = self.resample(F.interpolate(frames, scale_factor=2, mode="nearest-exact"))
        return rearrange(out, "(b t) c h w -> b c t h w", b=batch)


class CausalConv3d(nn.Conv3d):
    """Convolves each frame with the two before it (zeros before the clip): [B,C,T,h,w] -> [B,C',T,h,w]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, dtype=dtype)

    def forward(self, x: Tensor, past: PastQueue) -> Tensor:  # type: ignore[override]
        before = past.popleft()
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if before is None else torch.cat((before, x), dim=2)
        past.append(x[:, :, -2:].clone())  # a copy: a view would keep all of x alive
        return super().forward(x)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Calls oneDNN on a CPU, because torch takes a slow path for one small clip (8 times slower at 16 channels)."""
        has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
        if x.device.type == "cpu" and has_onednn():
            padding = cast("tuple[int, ...]", self.padding)
            return torch.mkldnn_convolution(x, weight, bias, padding, self.stride, self.dilation, self.groups)
        return cast(Tensor, super()._conv_forward(x, weight, bias))


class RMSNorm(nn.Module):
    """Divides [B,C,...] by the root mean square over channels, times gamma; `...` are `grid_dims` dimensions."""

    def __init__(self, channels: int, grid_dims: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * grid_dims, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12) / math.sqrt(x.shape[1])
        normed: Tensor = x / rms
        return normed.mul_(self.gamma)


def _middle(channels: int, dtype: torch.dtype) -> nn.ModuleList:
    res1, res2 = (ResidualBlock(channels, channels, dtype) for _ in range(2))
    return nn.ModuleList([res1, AttentionBlock(channels, dtype), res2])


def _start(network: nn.Module) -> PastQueue:
    """Returns the past before the first frame: None for each convolution over time."""
    return deque(None for m in network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1)
