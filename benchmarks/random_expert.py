"""Makes an expert of random weights and a forward's inputs for benchmarks: seeded, and never zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.attention import Sequence, WholeSequence, attention
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.dit import TextKV, WanDiT
from wanfast.runtime.models.rope import RotaryTables, rotary_tables

TINY = DiTSpec(dim=64, ffn_dim=96, num_heads=4, freq_dim=32, text_dim=24, text_len=16)


def random_expert(
    spec: DiTSpec,
    dtype: torch.dtype,
    device: str,
    sequence: Sequence = WholeSequence(),  # noqa: B008
    attend: AttentionFn = attention,
) -> WanDiT:
    """Returns an expert whose products preserve their input's scale; every value is exact in bf16, for any `dtype`."""
    with torch.device("meta"):
        model = WanDiT(spec, dtype, sequence, attend)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0
        values = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16) * scale
        parameter.data.copy_(values)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Inputs:
    """Holds a forward's inputs: latent [1, C, T, h, w], condition, timestep, two text embeddings, rotary tables."""

    latent: Tensor
    condition: Tensor
    timestep: Tensor
    texts: list[Tensor]
    rope: RotaryTables

    def arguments(self, text: list[TextKV]) -> tuple[Tensor, Tensor, Tensor, list[TextKV], RotaryTables]:
        return self.latent, self.condition, self.timestep, text, self.rope


def random_inputs(spec: DiTSpec, grid: tuple[int, int, int], device: str) -> Inputs:
    """Returns random inputs for a latent of size `grid` (frames, height, width)."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=device)

    T, h, w = grid
    return Inputs(
        normal(spec.out_channels, T, h, w),
        normal(spec.in_channels - spec.out_channels, T, h, w),
        torch.tensor([937], device=device),
        [normal(60 if spec.text_len > 60 else 6, spec.text_dim) for _ in range(2)],
        rotary_tables((T, h // 2, w // 2), spec.head_dim, device),
    )
