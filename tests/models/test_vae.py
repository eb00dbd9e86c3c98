"""Tests the VAE against diffusers' on shared random weights; chunks against whole clips; causality and purity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models import convolution, vae_fused
from wanfast.runtime.models import vae as vae_module
from wanfast.runtime.models.vae import WHOLE_FRAME, Rows, WanVAE, WholeFrame, _start
from wanfast.runtime.store import model_files
from wanfast.runtime.weights.builders import build_vae
from wanfast.runtime.weights.key_maps import rename

SPEC = VAESpec(base_dim=8)
# frames, height, width: 1 to 5 latent frames, square and not
CLIPS = [(1, 16, 16), (5, 24, 16), (9, 32, 40), (13, 16, 32), (17, 24, 16)]
MEAN = torch.tensor(SPEC.latents_mean).view(1, -1, 1, 1, 1)
STD = torch.tensor(SPEC.latents_std).view(1, -1, 1, 1, 1)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def reference() -> Any:
    """Returns diffusers' VAE with every parameter random, also those initialised to zero or one."""
    vae: Any = AutoencoderKLWan(  # type: ignore[no-untyped-call]
        base_dim=SPEC.base_dim,
        z_dim=SPEC.latent_channels,
        dim_mult=list(SPEC.dim_mult),
        num_res_blocks=SPEC.num_res_blocks,
        temperal_downsample=list(SPEC.temporal_downsample),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            parameter.data = 0.1 * noise
        else:
            parameter.data = noise * parameter[0].numel() ** -0.5
    vae.decoder.conv_out.weight.data *= 0.2  # keeps the video within [-1,1], so that the final clamp hides nothing
    return vae.eval()


@pytest.fixture(scope="module")
def vae(reference: Any) -> WanVAE:
    """Returns our VAE with the same weights, built as in production: on meta, then filled."""
    with torch.device("meta"):
        vae = WanVAE(SPEC)
    state = {rename("vae", "diffusers", key): tensor for key, tensor in reference.state_dict().items()}
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def video_of(frames: int, height: int, width: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.rand((batch, 3, frames, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_of(frames: int, height: int, width: int, *, batch: int = 1, seed: int = 2) -> Tensor:
    shape = (batch, SPEC.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_encode_equals_diffusers(vae: WanVAE, reference: Any, clip: tuple[int, int, int]) -> None:
    video = video_of(*clip, batch=2)
    expected = (reference.encode(video).latent_dist.mode() - MEAN) / STD
    error = relative_error(vae.encode(video), expected)
    print(f"encode {clip}: relative error {error:.1e}")
    assert error <= 1e-6  # as the README says


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_decode_equals_diffusers(vae: WanVAE, reference: Any, clip: tuple[int, int, int]) -> None:
    latents = latents_of(*clip, batch=2)
    expected = reference.decode(latents * STD + MEAN).sample
    clamped = float((expected.abs() == 1).float().mean())
    error = relative_error(vae.decode(latents), expected)
    print(f"decode {clip}: relative error {error:.1e}, {clamped:.1%} clamped")
    assert error <= 1e-6  # as the README says
    assert clamped < 0.05


def test_video_is_clamped(vae: WanVAE) -> None:
    bias = vae.decoder.conv_out.bias
    assert bias is not None
    bias += 5
    try:
        assert torch.equal(vae.decode(latents_of(5, 16, 16)), torch.ones(1, 3, 5, 16, 16))
    finally:
        bias -= 5


def test_decoding_piece_by_piece_equals_whole(vae: WanVAE) -> None:
    latents = latents_of(13, 16, 24)
    pieces = list(vae.decode_stream(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(latents))


def test_longer_chunks_give_the_same(vae: WanVAE) -> None:
    video, latents = video_of(13, 16, 16), latents_of(13, 16, 16)
    past = _start(vae.encoder)
    encoded = [vae._encode(x, past, WHOLE_FRAME) for x in torch.split(video, [1, 12], dim=2)]
    assert relative_error(torch.cat(encoded, dim=2), vae.encode(video)) <= TOLERANCE
    past = _start(vae.decoder)
    decoded = [vae._decode(z, past, WHOLE_FRAME) for z in torch.split(latents, [1, 3], dim=2)]
    assert relative_error(torch.cat(decoded, dim=2), vae.decode(latents)) <= TOLERANCE


def test_calls_leave_nothing_behind(vae: WanVAE) -> None:
    video, latents = video_of(9, 16, 16), latents_of(9, 16, 16)
    kept = latents.clone()
    assert torch.equal(vae.encode(video), vae.encode(video))
    assert torch.equal(vae.decode(latents), vae.decode(latents))
    assert torch.equal(latents, kept)


def test_two_clips_interleaved_do_not_mix(vae: WanVAE) -> None:
    a, b = latents_of(9, 16, 16, seed=3), latents_of(9, 16, 16, seed=4)
    pieces = list(zip(vae.decode_stream(a), vae.decode_stream(b), strict=True))
    for latents, own in zip((a, b), zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(own, dim=2), vae.decode(latents))


def test_a_later_frame_changes_no_earlier_latent(vae: WanVAE) -> None:
    video = video_of(13, 16, 16)
    changed = video.clone()
    changed[:, :, 5] *= -1  # the first frame of the third latent
    before, after = vae.encode(video), vae.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert all(not torch.equal(before[:, :, t], after[:, :, t]) for t in (2, 3))


def test_a_later_latent_changes_no_earlier_frame(vae: WanVAE) -> None:
    latents = latents_of(13, 16, 16)
    changed = latents.clone()
    changed[:, :, 2] *= -1
    before, after = vae.decode(latents), vae.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert all(not torch.equal(before[:, :, f], after[:, :, f]) for f in range(5, 13))


def test_strides_dtypes_and_size_of_the_past(vae: WanVAE) -> None:
    assert (SPEC.temporal_stride, SPEC.spatial_stride) == (4, 8)
    video, latents = video_of(5, 24, 16), latents_of(5, 24, 16)
    assert vae.encode(video.double()).dtype == torch.float32
    assert vae.encode(video).shape == latents.shape == (1, 16, 2, 3, 2)
    assert vae.decode(latents).shape == video.shape
    assert (len(_start(vae.encoder)), len(_start(vae.decoder))) == (24, 32)


def test_the_past_is_two_frames_and_holds_no_more_memory(vae: WanVAE) -> None:
    past = _start(vae.decoder)
    for _ in range(2):
        vae._decode(latents_of(1, 16, 16), past, WHOLE_FRAME)
    assert len(past) == 32
    for entry in past:
        assert entry is not None
        assert entry.shape[2] == 2
        assert entry.untyped_storage().nbytes() == entry.nbytes


def test_only_the_decoder_is_in_half_precision(vae: WanVAE) -> None:
    half = WanVAE(SPEC, torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    assert {p.dtype for p in half.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    video, latents = video_of(5, 16, 16), latents_of(5, 16, 16)
    assert torch.equal(half.encode(video), vae.encode(video))
    assert half.decode(latents).dtype == torch.float32
    assert 1e-5 < relative_error(half.decode(latents), vae.decode(latents)) < 0.02


def test_full_size_parameters() -> None:
    with torch.device("meta"):
        vae = WanVAE(VAESpec())
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert {name: tuple(p.shape) for name, p in vae.named_parameters() if "upsamples.7." in name} == {
        "decoder.upsamples.7.resample.weight": (192, 384, 3, 3),
        "decoder.upsamples.7.resample.bias": (192,),
        "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.7.time_conv.bias": (768,),
    }
    with_shortcut = {name.rsplit(".", 2)[0] for name, _ in vae.named_parameters() if "shortcut" in name}
    assert with_shortcut == {"encoder.downsamples.3", "encoder.downsamples.6", "decoder.upsamples.4"}


@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 12, 16), (0, 16, 16)], ids=str)
def test_a_clip_off_the_grid_is_refused(vae: WanVAE, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="frames must be 4n"):
        vae.encode(video_of(*shape))


@pytest.mark.parametrize("still_from", [1, 2, 6])
def test_a_still_clip_is_encoded_by_less_work_to_the_same_bits(vae: WanVAE, still_from: int) -> None:
    video = video_of(81, 16, 16)
    video[:, :, still_from:] = 0.25
    runs: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: runs.append(1)) for layer in vae.encoder.downsamples]
    try:
        whole = vae.encode(video)
        every = len(runs)
        shorter = vae.encode(video, still_from=still_from)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(shorter, whole)
    assert len(runs) - every < 0.6 * every
    if still_from == 1:  # by hand from the kernels and strides
        assert vae.encoder.settles(1, 4) == [3, 4, 5, 5, 6, 7, 7, 9, 11, 12, 16, 20]


def test_a_clip_that_moves_again_is_not_still(vae: WanVAE) -> None:
    video = video_of(81, 16, 16)
    video[:, :, 1:40] = 0.25
    assert not torch.equal(vae.encode(video), vae.encode(video, still_from=1))


@pytest.mark.parametrize("still_to", [80, 62])
def test_a_still_clip_that_ends_by_motion_is_encoded_to_the_same_bits(vae: WanVAE, still_to: int) -> None:
    """80 is a clip whose last frame is given."""
    video = video_of(81, 16, 16)
    video[:, :, 1:still_to] = 0
    runs: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: runs.append(1)) for layer in vae.encoder.downsamples]
    try:
        whole = vae.encode(video)
        every = len(runs)
        shorter = vae.encode(video, still_from=1, still_to=still_to)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(shorter, whole)
    assert len(runs) - every < 0.8 * every
    assert not torch.equal(vae.encode(video, still_from=1), whole)


class Part(WholeFrame):
    """Stands in for the rows of one of several ranks; no neighbour sends anything."""

    halo = 1

    def fill(self, clip: Tensor) -> None:
        clip[..., (0, -1), :] = 0


@pytest.mark.parametrize("rows", [WHOLE_FRAME, Part()], ids=["whole", "shared"])
def test_every_pass_reads_and_writes_channels_last(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """On a GPU, each other layout would cost a copy in front of a convolution or a kernel."""
    vae = build_vae(model_files.locate("tiny", ""), "cpu")
    wrong: list[str] = []
    convolve, norm, upsample = convolution._by_torch, vae_fused.rms_norm_silu_into, vae_fused.upsample

    def look(what: str, *tensors: Tensor) -> None:
        if not all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in tensors):
            wrong.append(f"{what} {[(tuple(x.shape), x.stride()) for x in tensors]}")

    def convolving(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        look("convolution", x, weight)
        return convolve(x, weight, *others).contiguous(memory_format=torch.channels_last_3d)  # as cuDNN's engines

    def norming(out: Tensor, x: Tensor, gamma: Tensor) -> None:
        look("norm", x)
        norm(out, x, gamma)

    def upsampling(x: Tensor, *others: int) -> Tensor:
        look("upsampling", x)
        return upsample(x, *others)

    monkeypatch.setattr(convolution, "_by_torch", convolving)
    monkeypatch.setattr(vae_module.vae_fused, "rms_norm_silu_into", norming)
    monkeypatch.setattr(vae_module.vae_fused, "upsample", upsampling)
    latents = vae.encode(video_of(9, 32, 48), rows=rows)
    for _ in vae.decode_stream(latents, rows):
        pass
    assert wrong == []
