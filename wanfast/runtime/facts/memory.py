"""Computes how many bytes of memory a video needs, for weights and for activations.

The bytes of weights are exact. The bytes of activations are an estimate, fitted to measurements at 1280x720, 81 frames.
The GB below are those of the A14B at this size.
For each token, a forward holds about seven float32 vectors of the model's width (11 GB). The text's keys and values
need 1.7 GB more. The VAE's bytes are proportional to the pixels of one frame times the VAE's base channels. The factor
is 145 bytes to encode (12.8 GB), 90 bytes to decode in bf16 (8.0 GB), and 175 bytes to decode in float32. About half of
the VAE's bytes are earlier frames, which causal convolutions read.
This module does not import torch.
"""

from __future__ import annotations

import math

from wanfast.runtime.facts.choices import Precision, Scheme, in_8_bits
from wanfast.runtime.facts.model_spec import DiTSpec, ModelSpec, UMT5Spec
from wanfast.runtime.facts.shapes import Geometry

_BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}
_LOOP_ROWS = 7
_ENCODE_BYTES = 145
_DECODE_BYTES: dict[Precision, int] = {"bf16": 90, "fp32": 175}
# Free bytes of an idle card: measured for 80 GB (an H100), else 10^9 bytes a GB.
CARDS = {"24 GB": 24 * 10**9, "48 GB": 48 * 10**9, "80 GB": 85 * 10**9, "141 GB": 141 * 10**9}
MARGIN_BYTES = 2 << 30  # CUDA's context, the libraries' workspaces, the allocator's fragmentation
CPU_MARGIN_BYTES = 3 << 28  # Python and torch: a process of the tiny model had 0.61 GB at its peak


def dit_parameters(spec: DiTSpec) -> tuple[int, int]:
    """Returns how many parameters of one expert have the run's precision, and how many are always float32."""
    d, patch = spec.dim, math.prod(spec.patch_size)
    block = 8 * (d * d + d) + 2 * d * spec.ffn_dim + spec.ffn_dim + d
    text = spec.text_dim * d + d + d * d + d
    products = spec.num_layers * block + text + d * spec.in_channels * patch + d
    block_norms = 4 * d + 2 * d + 6 * d  # q and k of two attentions, the norm with weights, the modulation
    time = spec.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d
    head = d * patch * spec.out_channels + patch * spec.out_channels + 2 * d
    return products, spec.num_layers * block_norms + time + head


def expert_bytes(spec: DiTSpec, precision: Precision, scheme: Scheme | None = None) -> int:
    """Returns the bytes of one expert's weights.

    With an 8-bit `scheme`, the linear weights of the blocks take one byte a value, plus a float32 scale for each row.
    """
    products, small = dit_parameters(spec)
    if not in_8_bits(scheme):
        return products * _BYTES[precision] + small * 4
    weights, rows = spec.num_layers * _block_weights(spec), spec.num_layers * (9 * spec.dim + spec.ffn_dim)
    return weights + (products - weights) * _BYTES[precision] + (small + rows) * 4


def block_bytes(spec: DiTSpec, precision: Precision) -> int:
    """Returns how many bytes the linear weights of one transformer block take if they are not quantized.

    A rank with sharded weights needs these bytes in addition to its shard, because it gathers whole blocks.
    """
    return _block_weights(spec) * _BYTES[precision]


def _block_weights(spec: DiTSpec) -> int:
    return 8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim


def offloaded_bytes(spec: DiTSpec, precision: Precision, scheme: Scheme | None = None) -> int:
    """Returns the bytes of pinned host memory for both experts, including 10 % for the unused ends of allocations."""
    return int(2 * expert_bytes(spec, precision, scheme) * 1.1)


def umt5_bytes(spec: UMT5Spec, precision: Precision) -> int:
    block = 4 * spec.dim * spec.attention_dim + 3 * spec.dim * spec.ffn_dim + 2 * spec.dim
    bias = spec.num_buckets * spec.num_heads
    parameters = spec.vocab_size * spec.dim + spec.num_layers * (block + bias) + spec.dim
    return parameters * _BYTES[precision]


def loop_bytes(spec: ModelSpec, precision: Precision, tokens: int, scheme: Scheme | None = None) -> int:
    """Returns the bytes that a forward needs in addition to the weights; `tokens` is the number of tokens on one rank.

    The text's keys and values are included. A `scheme` that quantizes activations adds three copies of the
    feed-forward network's activations: two in float32 and one in 8 bits. For a compiled forward the result is too
    large, because such a forward makes fewer copies.
    """
    dit = spec.dit
    quantizing = 9 * dit.ffn_dim * tokens if scheme in ("int8-dynamic", "fp8-rowwise") else 0
    text = 2 * dit.num_layers * dit.text_len * dit.dim * _BYTES[precision]  # of one expert and one branch
    return _LOOP_ROWS * 4 * dit.dim * tokens + 4 * text + quantizing


def residual_bytes(spec: DiTSpec, tokens: int) -> int:
    """Returns the bytes of the float32 residual that MagCache holds for one branch of guidance with `tokens` tokens."""
    return 4 * spec.dim * tokens


def encode_bytes(spec: ModelSpec, geometry: Geometry) -> int:
    """Returns an estimate of the bytes that encoding images needs in addition to the VAE's weights."""
    return _ENCODE_BYTES * spec.vae.base_dim * geometry.width * geometry.height


def decode_bytes(spec: ModelSpec, geometry: Geometry, vae_precision: Precision) -> int:
    """Returns an estimate of the bytes that decoding needs in addition to the VAE's weights."""
    return _DECODE_BYTES[vae_precision] * spec.vae.base_dim * geometry.width * geometry.height


def vae_bytes(spec: ModelSpec, geometry: Geometry, vae_precision: Precision) -> int:
    """Returns an estimate of the VAE's peak bytes: the larger of the encoder's peak and the decoder's peak.

    A model that takes no images encodes nothing, so for this model the result is the decoder's peak.
    """
    return max(spec.takes_images * encode_bytes(spec, geometry), decode_bytes(spec, geometry, vae_precision))


def gb(size: float) -> str:
    """Returns a number of bytes as text, in GB, MB or kB, such as "1.5 GB"."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
