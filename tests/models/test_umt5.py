"""Tests the UMT5 encoder against transformers' in fp32, with every parameter random, and its own invariants."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from wanfast.runtime.facts.model_spec import UMT5Spec
from wanfast.runtime.models.umt5 import UMT5Encoder, relative_position_buckets
from wanfast.runtime.weights.key_maps import rename

# dim differs from the attention width, so that a mix-up of the two fails.
TINY = UMT5Spec(vocab_size=200, dim=48, attention_dim=64, ffn_dim=80, num_heads=4, num_layers=3)
TOLERANCE = 2e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(2, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def randomise(model: torch.nn.Module) -> None:
    """Draws every parameter: norm scales near 1, the rest normal, matrices by fan-in to keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_table = "embed" in name or "shared" in name or "relative_attention_bias" in name
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise if is_table else noise / parameter.shape[1] ** 0.5)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=TINY.vocab_size,
        d_model=TINY.dim,
        d_kv=TINY.attention_dim // TINY.num_heads,
        d_ff=TINY.ffn_dim,
        num_heads=TINY.num_heads,
        num_layers=TINY.num_layers,
        relative_attention_num_buckets=TINY.num_buckets,
        relative_attention_max_distance=TINY.max_distance,
        layer_norm_epsilon=TINY.eps,
        feed_forward_proj="gated-gelu",
    )
    model = UMT5EncoderModel(config).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def encoder(reference: torch.nn.Module) -> UMT5Encoder:
    """Returns our encoder, filled from transformers' weights as from a checkpoint: on meta, strictly, by assignment."""
    weights = reference.state_dict()
    weights.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    with torch.device("meta"):
        model = UMT5Encoder(TINY, dtype=torch.float32)
    model.load_state_dict({rename("umt5", "diffusers", key): w for key, w in weights.items()}, strict=True, assign=True)
    return model.eval()


@pytest.mark.parametrize("length", [1, 2, 17, 130, 300])
@torch.inference_mode()
def test_equals_transformers_at_true_length(reference: torch.nn.Module, encoder: UMT5Encoder, length: int) -> None:
    ids = random_ids(2, length)
    error = relative_error(encoder(ids), reference(input_ids=ids).last_hidden_state)
    print(f"UMT5 against transformers, fp32, {length} tokens: relative error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
@torch.inference_mode()
def test_equals_transformers_on_a_padded_batch(
    reference: torch.nn.Module, encoder: UMT5Encoder, mask_dtype: torch.dtype
) -> None:
    ids, lengths = random_ids(3, 300), torch.tensor([300, 7, 180])
    mask = torch.arange(300) < lengths[:, None]
    ids = ids.masked_fill(~mask, 0)
    expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    error = relative_error(encoder(ids, mask.to(mask_dtype))[mask], expected[mask])
    print(f"UMT5 against transformers, fp32, padded batch, {mask_dtype}: relative error {error:.1e}")
    assert error <= TOLERANCE


@torch.inference_mode()
def test_padding_changes_nothing_but_only_when_masked(encoder: UMT5Encoder) -> None:
    ids = random_ids(1, 23)
    padded = torch.nn.functional.pad(ids, (0, 512 - 23))
    alone = encoder(ids)
    masked = relative_error(encoder(padded, padded != 0)[:, :23], alone)
    unmasked = relative_error(encoder(padded)[:, :23], alone)
    print(f"UMT5, 23 tokens padded to 512: relative error {masked:.1e} masked, {unmasked:.1e} unmasked")
    assert masked <= TOLERANCE < 0.05 < unmasked


def test_buckets_of_every_offset() -> None:
    # Edges by hand: each distance below 8, then every half octave (8 * 2**(j/2)), none beyond 91.
    first_distance = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    length = 400
    buckets = relative_position_buckets(length, 32, 128, torch.device("cpu"))
    for offset in range(1 - length, length):
        expected = sum(abs(offset) >= d for d in first_distance) - 1 + (16 if offset > 0 else 0)
        diagonal = buckets.diagonal(offset)  # entries [q, k] with k - q = offset
        assert (diagonal == expected).all(), offset


def test_no_length_stays_in_memory() -> None:
    """A list of many texts has many lengths, and each table takes 2 MB of a GPU at 512 tokens."""
    table = weakref.ref(relative_position_buckets(40, 32, 128, torch.device("cpu")))
    assert table() is None


@torch.inference_mode()
def test_bfloat16_stays_bfloat16_and_near_fp32(encoder: UMT5Encoder) -> None:
    half = UMT5Encoder(TINY)
    half.load_state_dict(encoder.state_dict())
    ids = random_ids(2, 150)
    output, exact = half(ids), encoder(ids)
    cosine = torch.cosine_similarity(output.float(), exact, dim=-1).min().item()
    print(f"UMT5, bf16 against fp32: smallest cosine of a token {cosine:.5f}")
    assert output.dtype == torch.bfloat16
    assert cosine > 0.99


def test_xxl_has_the_checkpoints_parameters() -> None:
    with torch.device("meta"):
        model = UMT5Encoder(UMT5Spec())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == len(model.state_dict()) == 242
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not list(model.buffers()), "a buffer would stay on meta"
    assert shapes["token_embedding.weight"] == (256384, 4096)
    assert shapes["norm.weight"] == (4096,)
    assert {name.removeprefix("blocks.23."): s for name, s in shapes.items() if name.startswith("blocks.23.")} == {
        "norm1.weight": (4096,),
        "attn.q.weight": (4096, 4096),
        "attn.k.weight": (4096, 4096),
        "attn.v.weight": (4096, 4096),
        "attn.o.weight": (4096, 4096),
        "pos_embedding.embedding.weight": (32, 64),
        "norm2.weight": (4096,),
        "ffn.gate.0.weight": (10240, 4096),
        "ffn.fc1.weight": (10240, 4096),
        "ffn.fc2.weight": (4096, 10240),
    }
