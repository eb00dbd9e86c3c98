"""Computes the FLOP of a forward, and states the bf16 peak of each kind of GPU.

This module does not import torch.
"""

from __future__ import annotations

from wanfast.runtime.facts.model_spec import DiTSpec

# Dense bf16 peaks in FLOP/s, from the datasheets; a name of the driver begins with one of these, the longest counts.
_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}


def forward_flop(spec: DiTSpec, tokens: int) -> float:
    """Returns the FLOP of one forward: projections, feed-forward networks, self-attention and cross-attention.

    The text's keys and values are not counted, because they are computed only once for each prompt.
    """
    return linear_flop(spec, tokens) + attention_flop(spec, tokens)


def linear_flop(spec: DiTSpec, tokens: int) -> float:
    """Returns the FLOP that the projections and the feed-forward networks take in one forward."""
    return spec.num_layers * 2 * tokens * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim)


def attention_flop(spec: DiTSpec, tokens: int) -> float:
    """Returns the FLOP of self- and cross-attention of one forward."""
    return spec.num_layers * 4 * tokens * (tokens + spec.text_len) * spec.dim


def bf16_peak(gpu: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s of a GPU with this name; None for a CPU or an unknown GPU."""
    known = [name for name in _PEAKS if gpu.startswith(name)]
    return _PEAKS[max(known, key=len)] if known else None
