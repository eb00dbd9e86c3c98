"""The causal video VAE of Wan 2.1 encodes video into latents, 4x8x8 smaller (time, height, width), and decodes them.

Every convolution over time reads only the current frame and earlier ones. So the VAE processes a clip in chunks of a
few frames. The first chunk is the first frame, which gives one latent frame. Each later latent frame represents four
frames of video. No module holds state. Instead, `encode` and `decode_stream` hold the *past*: a queue with one tensor
for each convolution over time, in running order. Each tensor holds the earlier frames that its convolution needs. While
a chunk runs, each convolution takes its tensor from the front of the queue and appends the one for the next chunk.

Cost at 1280x720, 81 frames: encode 382 TFLOP, decode 639 TFLOP. An activation of 4 full-size frames with 96 channels
takes 1.4 GB in float32, and the decoder's past takes 8.7 GB.
The encoder computes in float32, as the reference does, and the decoder in `decoder_dtype`. FastVideo reports that
bfloat16 is harmless in decoding (MS-SSIM 0.9999) but not in encoding.
Source: Wan technical report (arXiv 2503.20314); Wan-Video/Wan2.2 `wan/modules/vae2_1.py` (42bf4cf).

Ranks may share the rows of each frame (`Rows`). Then each rank takes and returns only its own rows. A convolution also
reads the row above a rank's own rows and the row below them. The neighbouring ranks send these two rows.

Shapes: B batch, C channels, F frames of video, T frames (of any rate), H W pixels, Y X latent grid, h w any grid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models import vae_fused
from wanfast.runtime.models.convolution import Triple, convolve, padded_channels

PastQueue: TypeAlias = deque[Tensor | None]  # None: no frame came before
Pair: TypeAlias = tuple[int, int]


class Rows(Protocol):
    """This interface divides the rows of each frame among the ranks, and exchanges rows between the ranks."""

    @property
    def halo(self) -> int:
        """Returns how many rows of each neighbouring rank a convolution reads: 1, or 0 if one rank has all rows."""
        ...

    @property
    def has_part(self) -> bool:
        """Returns whether this rank has rows of the frame.

        If there are more ranks than latent rows, some ranks have no rows.
        """
        ...

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's rows of x; the rows lie along `dim` of x.

        The length of `dim` must be a multiple of the number of latent rows of the frame.
        """
        ...

    def fill(self, clip: Tensor) -> None:
        """Fills the first row and the last row of a clip [B,C,T,h+2,w], in place.

        These two rows come from the neighbouring ranks. At an edge of the frame there is no neighbour, and the row
        becomes zeros.
        """
        ...

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Returns the rows of all ranks, joined along `dim`; each rank that has rows must call this method."""
        ...

    def collect(self, x: Tensor, dim: int) -> Tensor | None:
        """Returns the rows of all ranks, joined along `dim`, if this rank is the leader; otherwise returns None.

        Each rank that has rows must call this method, because the other ranks send their rows to the leader.
        """
        ...

    def missed(self, device: str) -> Rows | None:
        """Returns the `Rows` with which this rank repeats its work after it ran out of memory.

        The other ranks wait for this rank's rows. So this rank repeats its work on the meta device, where nothing is
        computed. The returned object skips the exchanges that were done before the rank ran out of memory. In each
        later exchange, the returned object sends zeros that lie on `device`.
        Returns None if this rank has all rows, because then no other rank waits.
        """
        ...


class WholeFrame:
    """This class implements `Rows` for a single rank, which has all rows and exchanges nothing."""

    halo, has_part = 0, True

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x

    def fill(self, clip: Tensor) -> None:
        pass

    def gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def collect(self, x: Tensor, dim: int) -> Tensor | None:
        return x

    def missed(self, device: str) -> None:
        return None


WHOLE_FRAME = WholeFrame()


class WanVAE(nn.Module):
    """Maps video [B,3,F,H,W] in [-1,1] to normalised latents [B,16,T,Y,X] and back; F = 4(T-1)+1, H = 8Y, W = 8X."""

    def __init__(self, spec: VAESpec, decoder_dtype: torch.dtype = torch.float32) -> None:
        """The encoder is always in float32: the latents of the first frame steer the whole video."""
        super().__init__()
        self.spec = spec
        self.decoder_dtype = decoder_dtype
        self.encoder = Encoder(spec, torch.float32)
        self.quant_conv = nn.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1, dtype=decoder_dtype)
        self.decoder = Decoder(spec, decoder_dtype)

    def lay_out(self) -> None:
        """Converts convolution weights to the channels-last memory format, so that no convolution copies them."""
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if layout := layouts.get(parameter.dim()):
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def encode(
        self, video: Tensor, still_from: int | None = None, still_to: int | None = None, rows: Rows = WHOLE_FRAME
    ) -> Tensor:
        """Returns the float32 latents [B,16,T,Y,X] of video [B,3,F,H,W]: the posterior's normalised mean, not a sample.

        `still_from` and `still_to` save time if the frames from index `still_from` to `still_to` - 1 are equal: most
        layers then compute only some of these frames. The latents are bitwise the same as without these arguments. For
        an image and 80 grey frames, a third of the work remains. If `still_from` is None, all layers compute all
        frames. If `still_to` is None, the equal frames reach to the end of the clip.
        If `rows` divides the frame among ranks, the video and the latents contain only this rank's rows.
        Raises ValueError if F is not 4n+1, or if H or W is not a multiple of 8.
        """
        frames, height, width = video.shape[2:]
        stride = self.spec.spatial_stride
        if frames % self.spec.temporal_stride != 1 or height % stride or width % stride:
            raise ValueError(
                f"a video of {frames} frames, {height}x{width} (height x width): the number of frames must be "
                f"{self.spec.temporal_stride}n+1, and height and width must be multiples of {stride}"
            )
        queue = _start(self.encoder)
        chunks = torch.split(video, [1] + [self.spec.temporal_stride] * (frames // self.spec.temporal_stride), dim=2)
        repeats = _Repeats(self.encoder.settles(still_from or frames, self.spec.temporal_stride))
        ends = range(1, frames + 1, self.spec.temporal_stride)
        is_still = [end <= (still_to or frames) for end in ends]
        latents = [
            self._encode(x, queue, rows, repeats if still else None) for x, still in zip(chunks, is_still, strict=True)
        ]
        return torch.cat(latents, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B,16,T,Y,X] to video [B,3,F,H,W] in [-1,1]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: Tensor, rows: Rows = WHOLE_FRAME) -> Iterator[Tensor]:
        """Decodes latents [B,16,T,Y,X], and yields the video in T pieces with values in [-1,1].

        The first piece is [B,3,1,H,W]; every later piece is [B,3,4,H,W]. If `rows` divides the frame among ranks, the
        latents and the pieces contain only this rank's rows.
        """
        queue = _start(self.decoder)
        for z in torch.split(latents, 1, dim=2):
            yield self._decode(z, queue, rows)

    def _encode(self, video: Tensor, queue: PastQueue, rows: Rows, repeats: _Repeats | None = None) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(video.float(), queue, rows, repeats or _Repeats([])))
        mean, inverse_std = latent_statistics(self.spec, video.device)
        return (moments.chunk(2, dim=1)[0] - mean) * inverse_std

    def _decode(self, latents: Tensor, queue: PastQueue, rows: Rows) -> Tensor:
        mean, inverse_std = latent_statistics(self.spec, latents.device)
        z = self.post_quant_conv((latents / inverse_std + mean).to(self.decoder_dtype))
        video: Tensor = self.decoder(z, queue, rows)
        return video.float().clamp_(-1, 1)


@cache
@torch.inference_mode(False)  # so that training can use the tensors too
def latent_statistics(spec: VAESpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the latents' mean and 1/std, each [C,1,1,1] float32, on `device`.

    The two tensors are not buffers, because a module that is built on the meta device would lose the values of its
    buffers.
    """
    mean = torch.tensor(spec.latents_mean, dtype=torch.float32, device=device)
    std = torch.tensor(spec.latents_std, dtype=torch.float32, device=device)
    return mean.view(-1, 1, 1, 1), std.reciprocal().view(-1, 1, 1, 1)


class Encoder(nn.Module):
    """Maps video [B,3,F,H,W] to the moments [B,2*16,T,Y,X] of the posterior: the mean, then the log-variance."""

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

    def forward(self, x: Tensor, past: PastQueue, rows: Rows, repeats: _Repeats) -> Tensor:
        layers = (self.conv_in, *self.downsamples, *self.middle)
        x, done = repeats.start(x)
        past.rotate(-sum(map(_count_past, layers[:done])))  # what is not computed again keeps its past
        for number, layer in enumerate(layers[done:], done + 1):
            x = layer(x, past, rows)
            repeats.keep(x, number)
        moments: Tensor = self.conv_out(x, past, rows, self.norm_out)
        return moments

    def settles(self, still_from: int, frames: int) -> list[int]:
        """Returns, for each layer before the middle blocks, the number of the first chunk that the layer can skip.

        A layer can skip a chunk, and all later chunks, if its output would be the same as for the chunk before.
        `still_from`: the index from which all frames of the clip are equal. The first chunk has one
        frame, and each later chunk has `frames` frames. Frames and chunks count from 0.
        """
        # A convolution over time also reads the two frames before each frame. So in its output, the equal frames begin
        # two frames later. A layer that halves the number of frames halves the index at which the equal frames begin.
        still, chunks = still_from + 2, []
        chunks.append(_settled_chunk(still, frames))
        for layer in self.downsamples:
            if isinstance(layer, ResidualBlock):
                still += 4
            elif layer.time_conv is not None:
                still, frames = -(-still // 2) + 1, frames // 2
            chunks.append(_settled_chunk(still, frames))
        return chunks


class _Repeats:
    """Holds the output of the deepest layer of the encoder that repeats itself, while a still clip is encoded."""

    def __init__(self, settles: list[int]) -> None:
        """Takes, for each layer, the first chunk whose output the chunk before has too."""
        self._settles, self._chunk = settles, -1
        self._kept: Tensor | None = None

    def start(self, x: Tensor) -> tuple[Tensor, int]:
        """Begins the next chunk; returns (the input of the first layer to run, the number of layers that are skipped).

        `x`: the encoder's input for this chunk. If no layer is skipped, returns (x, 0). Otherwise the first layers
        are skipped, and the first value is the output of the last skipped layer, as `keep` stored it.
        """
        self._chunk += 1
        return (x, 0) if self._kept is None else (self._kept, self._layers(self._chunk))

    def keep(self, x: Tensor, layers: int) -> None:
        """Stores x, the output of the first `layers` layers, if the next chunk skips exactly these layers."""
        if layers == self._layers(self._chunk + 1):
            self._kept = x

    def _layers(self, chunk: int) -> int:
        return sum(settled <= chunk for settled in self._settles)


class Decoder(nn.Module):
    """Maps latents [B,16,T,Y,X] to video [B,3,F,H,W]."""

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

    def forward(self, x: Tensor, past: PastQueue, rows: Rows) -> Tensor:
        x = self.conv_in(x, past, rows)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, past, rows)
        video: Tensor = self.conv_out(x, past, rows, self.norm_out)
        return video


class ResidualBlock(nn.Module):
    """Applies the sequence of norm, SiLU and convolution twice, and adds the block's input to the result.

    The block maps [B,C,T,h,w] to [B,C',T,h,w]. If C' differs from C, a 1x1x1 convolution maps the added input to C'
    channels.
    """

    def __init__(self, in_channels: int, out_channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, 3, dtype)
        self.conv1 = CausalConv3d(in_channels, out_channels, dtype=dtype)
        self.norm2 = RMSNorm(out_channels, 3, dtype)
        self.conv2 = CausalConv3d(out_channels, out_channels, dtype=dtype)
        self.shortcut = Conv3d(in_channels, out_channels, 1, dtype=dtype) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: PastQueue, rows: Rows) -> Tensor:
        clip = self.conv2.extended(self.conv1(x, past, rows, self.norm1), past, rows, self.norm2)
        h = self.conv2.convolved(clip, rows)  # the output of conv1 is free by now
        del clip
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Applies self-attention within each frame of a clip [B,C,T,h,w], and adds the result to the clip.

    The h * w positions of a frame are its tokens. There is one head, which has C channels.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2, dtype)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, dtype=dtype)
        self.proj = nn.Conv2d(channels, channels, 1, dtype=dtype)

    def forward(self, x: Tensor, _past: PastQueue, rows: Rows) -> Tensor:
        batch, height = x.shape[0], x.shape[3]
        tokens = rearrange(self.norm(_frames(x)), "n c h w -> n (h w) c")
        q, k, v = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        mixed = F.linear(
            _attention(q, rows.gather(k, 1), rows.gather(v, 1)), self.proj.weight.flatten(1), self.proj.bias
        )
        return x + rearrange(mixed, "(b t) (h w) c -> b c t h w", b=batch, h=height)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(C)) v for q [n, l, C] and k, v [n, L, C]; no flash kernel takes so wide a head."""
    if not q.is_cuda or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    out = torch.empty_like(q)
    for one, keys, values, mixed in zip(q, k, v, out, strict=True):  # frame by frame: the scores are L^2 values
        scores = torch.mm(one * one.shape[-1] ** -0.5, keys.t(), out_dtype=torch.float32)
        torch.mm(torch.softmax(scores, -1).to(v.dtype), values, out=mixed)
    return out


class Downsample(nn.Module):
    """Maps [B,C,T,h,w] to [B,C,T,h/2,w/2].

    If `temporal` is true, every two frames also become one frame, except a clip's first frame, which stays one frame.
    """

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Conv2d(channels, channels, 3, stride=2, dtype=dtype)
        self.time_conv = Conv3d(channels, channels, (3, 1, 1), (2, 1, 1), dtype=dtype) if temporal else None

    def forward(self, x: Tensor, past: PastQueue, rows: Rows) -> Tensor:
        below = _with_halo(x, rows)[:, :, :, 1:] if rows.halo else F.pad(x, (0, 0, 0, 1))
        x = convolve_frames(F.pad(below, (0, 1)), self.resample)
        if self.time_conv is None:
            return x
        before = past.popleft()
        past.append(x[:, :, -1:].clone())
        return x if before is None else self.time_conv(torch.cat((before, x), dim=2))


class Upsample(nn.Module):
    """Maps [B,C,T,h,w] to [B,C/2,T,2h,2w].

    If `temporal` is true, each frame also becomes two frames, except a clip's first frame. The convolution over time
    does not run for the first frame. For later frames, the convolution reads zeros in place of the first frame.
    """

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.Conv2d(channels, channels // 2, 3, padding=1, dtype=dtype)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), dtype) if temporal else None

    def forward(self, x: Tensor, past: PastQueue, rows: Rows) -> Tensor:
        rate = 1
        if self.time_conv is not None and past[0] is None:
            past.popleft()
            past.append(torch.zeros_like(x).expand(-1, -1, 2, -1, -1))
        elif self.time_conv is not None:
            x, rate = self.time_conv(x, past, rows), 2
        frames = vae_fused.upsample(x, rate, rows.halo)
        rows.fill(frames)
        return convolve_frames(frames, self.resample, rows.halo)


class Conv3d(nn.Conv3d):
    """This layer convolves clips [B,C,T,h,w] by the function `convolve`, which chooses a fast cuDNN engine."""

    def forward(self, x: Tensor, halo: int = 0) -> Tensor:
        """Convolves x, which already has `halo` additional rows at the top and at the bottom.

        These rows replace padding: the convolution pads `halo` fewer rows at the top and at the bottom.
        """
        stride, (time, top, left) = cast(Triple, self.stride), cast(Triple, self.padding)
        return convolve(x, self.weight, cast(Tensor, self.bias), stride=stride, padding=(time, top - halo, left))


class CausalConv3d(Conv3d):
    """Convolves each frame together with the two frames before this frame: maps [B,C,T,h,w] to [B,C',T,h,w].

    Before a clip's first frame, the missing frames are zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = (3, 3, 3),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, dtype=dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, past: PastQueue, rows: Rows, norm: RMSNorm | None = None
    ) -> Tensor:
        """Convolves x, or SiLU(norm(x)) if `norm` is given, together with two earlier frames.

        The two earlier frames are this convolution's entry in `past`. The call replaces this entry with the last two
        frames of the convolution's input.
        """
        return self.convolved(self.extended(x, past, rows, norm), rows)

    def extended(self, x: Tensor, past: PastQueue, rows: Rows, norm: RMSNorm | None = None) -> Tensor:
        """Returns the convolution's input: x, extended by two earlier frames and by rows of other ranks.

        If `norm` is given, SiLU(norm(x)) takes the place of x. The two earlier frames are this convolution's entry in
        `past`. The call replaces this entry with the last two frames of the returned input.
        """
        if torch.is_grad_enabled():
            return self._joined(x if norm is None else norm(x, silu=True), past)
        batch, channels, frames, height, width = x.shape
        before, halo = past.popleft(), self._halo(rows)
        padded = padded_channels(channels, x.dtype, x.device)
        shape, layout = (batch, padded, 2 + frames, height + 2 * halo, width), torch.channels_last_3d
        clip = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        clip[:, channels:] = 0
        clip[:, :, :2] = 0 if before is None else before
        own = clip[:, :, 2:, halo : halo + height]
        if norm is None:
            own[:, :channels] = x
        else:
            norm.into(own, x)
        if halo:
            rows.fill(clip[:, :channels, 2:])
        past.append(clip[:, :, -2:].clone())  # a copy: a view would keep all of the clip alive
        return clip

    def _joined(self, x: Tensor, past: PastQueue) -> Tensor:
        """Returns what `extended` does, on one rank, without writing into a part of a tensor, for a fast backward."""
        before = past.popleft()
        clip = torch.cat((torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1) if before is None else before, x), 2)
        past.append(clip[:, :, -2:])
        return clip

    def convolved(self, clip: Tensor, rows: Rows) -> Tensor:
        """Convolves `clip`, which `extended` returned."""
        return super().forward(clip, self._halo(rows))

    def _halo(self, rows: Rows) -> int:
        return rows.halo if self.kernel_size[1] > 1 else 0


class RMSNorm(nn.Module):
    """Divides x [B,C,...] by its root mean square over C and multiplies by gamma; `...` has `grid_dims` dimensions."""

    def __init__(self, channels: int, grid_dims: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * grid_dims, dtype=dtype))

    def forward(self, x: Tensor, *, silu: bool = False) -> Tensor:
        """Returns the normalised x; if `silu` is true, returns SiLU(normalised x) instead."""
        return vae_fused.rms_norm(x, self.gamma, silu=silu)

    def into(self, out: Tensor, x: Tensor) -> None:
        """Writes SiLU(norm(x)) into the first channels of `out`, which may have more channels than x."""
        vae_fused.rms_norm_silu_into(out, x, self.gamma)


def _middle(channels: int, dtype: torch.dtype) -> nn.ModuleList:
    res1, res2 = (ResidualBlock(channels, channels, dtype) for _ in range(2))
    return nn.ModuleList([res1, AttentionBlock(channels, dtype), res2])


def _frames(x: Tensor) -> Tensor:
    """Returns the frames of a clip, [B*T,C,h,w]; of a channels-last clip without a copy."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def _with_halo(x: Tensor, rows: Rows) -> Tensor:
    """Returns x [B,C,T,h,w] with the rows above and below it."""
    extended = F.pad(x, (0, 0, rows.halo, rows.halo))
    rows.fill(extended)
    return extended


def convolve_frames(x: Tensor, conv: nn.Conv2d, halo: int = 0) -> Tensor:
    """Convolves each frame of x [B,C,T,h,w]; x already has `halo` rows of the padding at the top and at the bottom."""
    (down, right), (top, left) = cast(Pair, conv.stride), cast(Pair, conv.padding)
    weight = conv.weight.unsqueeze(2)
    return convolve(x, weight, cast(Tensor, conv.bias), stride=(1, down, right), padding=(0, top - halo, left))


def _start(network: nn.Module) -> PastQueue:
    """Returns the past before the first frame: None for each convolution over time."""
    return deque([None] * _count_past(network))


def _count_past(network: nn.Module) -> int:
    """Returns the number of convolutions over time."""
    return sum(isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1 for module in network.modules())


def _settled_chunk(still: int, frames: int) -> int:
    """Returns the first chunk equal to the one before; frames from `still` on are alike, `frames` to a chunk."""
    return -(-(still - 1) // frames) + 2
