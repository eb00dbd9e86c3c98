"""Tests DiT parity with diffusers' WanTransformer3DModel: same random weights through the key map, fp32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.dit import Stream, TextKV, WanDiT, sinusoid
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.weights.key_maps import rename

SPECS = {
    "tiny": DiTSpec(dim=96, ffn_dim=160, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, text_len=16),
    "uneven rotary split": DiTSpec(dim=80, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32, text_dim=24, text_len=9),
    "head dim 128": DiTSpec(dim=256, ffn_dim=320, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=16),
    "eight heads": DiTSpec(dim=160, ffn_dim=200, num_heads=8, num_layers=2, freq_dim=64, text_dim=40, text_len=16),
}
GRIDS = [(1, 2, 2), (3, 6, 6), (2, 4, 10), (5, 6, 2)]  # latent frames, height, width


def reference_and_ours(spec: DiTSpec) -> tuple[WanTransformer3DModel, WanDiT]:
    reference = WanTransformer3DModel(
        patch_size=spec.patch_size,
        num_attention_heads=spec.num_heads,
        attention_head_dim=spec.head_dim,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        text_dim=spec.text_dim,
        freq_dim=spec.freq_dim,
        ffn_dim=spec.ffn_dim,
        num_layers=spec.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=spec.eps,
    ).eval()
    randomise(reference, seed=1)
    ours = WanDiT(spec, dtype=torch.float32)
    ours.load_state_dict({rename("dit", "diffusers", k): v for k, v in reference.state_dict().items()}, strict=True)
    return reference, ours


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_velocity_equals_diffusers(name: str, grid: tuple[int, int, int]) -> None:
    spec = SPECS[name]
    reference, ours = reference_and_ours(spec)
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(1, 16, *grid, generator=generator)
    condition = torch.randn(1, 20, *grid, generator=generator)
    text = torch.randn(1, 7, spec.text_dim, generator=generator)
    timestep = torch.tensor([617])

    padded = torch.nn.functional.pad(text, (0, 0, 0, spec.text_len - 7))
    expected = reference(torch.cat((latent, condition), 1), timestep, padded).sample
    T, h, w = grid
    rope = rotary_tables((T, h // 2, w // 2), spec.head_dim)
    got, _ = ours(latent, condition, timestep, ours.encode_text(text), rope)

    error = relative_error(got, expected)
    print(f"DiT {name} {grid}: relative error {error:.1e}")
    assert error <= 2e-5


@torch.no_grad()
def test_fused_projections_are_the_same_model() -> None:
    spec = SPECS["tiny"]
    _, ours = reference_and_ours(spec)
    generator = torch.Generator().manual_seed(2)
    latent, condition = (torch.randn(1, c, 3, 6, 6, generator=generator) for c in (16, 20))
    text = ours.encode_text(torch.randn(1, 7, spec.text_dim, generator=generator))
    rope, before = rotary_tables((3, 3, 3), spec.head_dim), ours.state_dict()

    expected, _ = ours(latent, condition, torch.tensor([617]), text, rope)
    ours.fuse_projections()
    names = dict(ours.named_parameters())
    assert "blocks.0.self_attn.qkv.weight" in names and "blocks.0.self_attn.q.weight" not in names
    error = relative_error(ours(latent, condition, torch.tensor([617]), text, rope)[0], expected)
    print(f"DiT fused against not: relative error {error:.1e}")
    assert error <= 1e-6
    after = ours.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_text_padding_is_zeros_and_is_attended_to() -> None:
    spec = SPECS["tiny"]
    _, ours = reference_and_ours(spec)
    text = torch.randn(1, 4, spec.text_dim, generator=torch.Generator().manual_seed(3))
    latent, condition = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 20, 1, 4, 4)
    rope = rotary_tables((1, 2, 2), spec.head_dim)

    def velocity(kv: list[TextKV]) -> torch.Tensor:
        out: torch.Tensor = ours(latent, condition, torch.tensor([5]), kv, rope)[0]
        return out

    padded = velocity(ours.encode_text(text))
    zeros = torch.zeros(1, spec.text_len - 4, spec.text_dim)
    assert torch.equal(velocity(ours.encode_text(torch.cat((text, zeros), 1))), padded)
    unpadded = [TextKV(k[:, :4], v[:, :4]) for k, v in ours.encode_text(text)]
    assert relative_error(velocity(unpadded), padded) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_tokens_lie_one_after_the_other(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are contiguous for any strides of the convolution, so that the first block is no separate graph."""
    spec, seen = SPECS["tiny"], []
    ours = WanDiT(spec, dtype=dtype)
    convolve = ours.patch_embedding.forward
    monkeypatch.setattr(ours.patch_embedding, "forward", lambda x: convolve(x).contiguous())
    ours.blocks[0].register_forward_hook(lambda _, inputs, output: seen.extend((*inputs[0], *output)))
    text = ours.encode_text(torch.randn(1, 5, spec.text_dim))
    latent, condition = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 20, 2, 4, 4)
    ours(latent, condition, torch.tensor([7]), text, rotary_tables((2, 2, 2), spec.head_dim))
    assert all(tensor.stride() == torch.empty(tensor.shape).stride() for tensor in seen)


@torch.no_grad()
def test_the_residual_stream_is_fp32_and_products_are_bf16() -> None:
    """The precision of intermediate values follows WAN_SPEC 2.4, which a bound on the final error cannot show."""
    spec = SPECS["head dim 128"]
    ours = WanDiT(spec, dtype=torch.bfloat16)
    randomise(ours, seed=5)
    seen: dict[str, list[torch.Tensor]] = {"stream": [], "product": []}
    for block in ours.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen["stream"].append(output.x))
        for module in (block.self_attn.o, block.cross_attn.q, block.ffn[0], block.self_attn.norm_q):
            module.register_forward_hook(lambda _, inputs, output: seen["product"].extend((inputs[0], output)))
    text = ours.encode_text(torch.randn(1, 5, spec.text_dim))
    ours(
        torch.randn(1, 16, 1, 4, 4), torch.randn(1, 20, 1, 4, 4), torch.tensor([7]), text, rotary_tables((1, 2, 2), 128)
    )
    assert {tensor.dtype for tensor in seen["stream"]} == {torch.float32}
    assert {tensor.dtype for tensor in seen["product"]} == {torch.bfloat16}
    for tensor in seen["stream"]:  # really float32: bfloat16 cannot hold these values
        assert not torch.equal(tensor, tensor.bfloat16().float())


def test_the_sinusoid_is_formed_in_float64() -> None:
    timesteps = np.array([999.0, 618.0, 1.0])
    angles = np.outer(timesteps, 10000.0 ** -(np.arange(128) / 128))
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
    assert np.abs(sinusoid(torch.tensor([999, 618, 1]), 256).numpy() - expected).max() <= 6e-8


@torch.no_grad()
def test_bf16_products_keep_small_parameters_and_output_in_fp32() -> None:
    spec = SPECS["head dim 128"]
    _, exact = reference_and_ours(spec)
    ours = WanDiT(spec, dtype=torch.bfloat16)
    wanted = ours.state_dict()
    ours.load_state_dict({k: v.to(wanted[k].dtype) for k, v in exact.state_dict().items()})

    assert all(v.dtype == torch.float32 for k, v in wanted.items() if "modulation" in k or "norm" in k or "time" in k)
    assert all(v.dtype == torch.bfloat16 for k, v in wanted.items() if ".self_attn.q." in k or ".ffn." in k)

    generator = torch.Generator().manual_seed(4)
    latent, condition = (
        torch.randn(1, 16, 3, 6, 6, generator=generator),
        torch.randn(1, 20, 3, 6, 6, generator=generator),
    )
    text, rope = torch.randn(1, 5, spec.text_dim, generator=generator), rotary_tables((3, 3, 3), spec.head_dim)
    timestep = torch.tensor([950])
    got, _ = ours(latent, condition, timestep, ours.encode_text(text.bfloat16()), rope)
    error = relative_error(got, exact(latent, condition, timestep, exact.encode_text(text), rope)[0])
    print(f"DiT bf16 against fp32: relative error {error:.1e}")
    assert got.dtype == torch.float32
    assert 1e-4 < error < 2e-2


@torch.no_grad()
def test_a_cached_residual_stands_in_for_the_blocks() -> None:
    """A residual of the same call gives the same velocity; one of another call stands for only the blocks' part.

    Patches, head and time come from this call.
    """
    spec = SPECS["tiny"]
    _, ours = reference_and_ours(spec)
    text = ours.encode_text(torch.randn(1, 5, spec.text_dim))
    rope = rotary_tables((2, 2, 2), spec.head_dim)
    first, second = torch.randn(2, 1, 16, 2, 4, 4)
    condition = torch.randn(1, 20, 2, 4, 4)

    def call(latent: torch.Tensor, timestep: int, cached: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        ran: list[int] = []
        out = ours(latent, condition, torch.tensor([timestep]), text, rope, ran.append, cached, keep_residual=True)
        assert ran == ([] if cached is not None else [*range(spec.num_layers)])
        return out  # type: ignore[no-any-return]

    velocity, residual = call(first, 617)
    assert residual.shape == (1, 8, spec.dim) and residual.dtype == torch.float32
    again, same = call(first, 617, residual)
    assert relative_error(again, velocity) <= 1e-6 and relative_error(same, residual) <= 1e-6

    tokens = ours.patch_embedding(torch.cat((second, condition), 1)).flatten(2).transpose(1, 2)
    stream = Stream(tokens + residual, torch.zeros_like(tokens), torch.ones(1, 1, spec.dim))
    patches, _ = ours.head(stream, ours.time_embedding(sinusoid(torch.tensor([500]), spec.freq_dim)))
    reused, _ = call(second, 500, residual)
    assert relative_error(reused, ours._unpatchify(patches, torch.Size((2, 2, 2)))) <= 1e-6
    assert relative_error(reused, call(second, 500)[0]) > 1e-3
