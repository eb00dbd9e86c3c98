"""Write the tiny model with seeded random weights: the classes and code path of A14B at small dims, nothing learned.

    python training/make_random_tiny.py

Head dim 128 as in A14B, so that every kernel of the real model runs on it. It is replaced once a tiny model is trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from wanfast.runtime import checkpoint
from wanfast.runtime.model_files import TINY
from wanfast.runtime.model_spec import DiTSpec, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE

SPEC = ModelSpec(
    name="tiny",
    repo_id=None,
    weights_note="the tiny model's weights are seeded random, not trained: its video is coloured noise",
    dit=DiTSpec(dim=256, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=64, text_dim=64),
    vae=VAESpec(base_dim=8),
    umt5=UMT5Spec(vocab_size=960, dim=64, attention_dim=64, ffn_dim=160, num_heads=4, num_layers=2),
    size="128x128",
    frames=17,
    shift_480p=None,
)


def main() -> None:
    networks: list[tuple[nn.Module, checkpoint.Component, str, int]] = [
        (WanDiT(SPEC.dit, torch.float32), "dit", "transformer/diffusion_pytorch_model.safetensors", 1),
        (WanDiT(SPEC.dit, torch.float32), "dit", "transformer_2/diffusion_pytorch_model.safetensors", 2),
        (WanVAE(SPEC.vae, torch.float32), "vae", "vae/diffusion_pytorch_model.safetensors", 3),
        (UMT5Encoder(SPEC.umt5, torch.float32), "umt5", "text_encoder/model.safetensors", 4),
    ]
    for network, component, file, seed in networks:
        draw(network, seed)
        checkpoint.save(network, TINY / file, component=component, layout="diffusers", dtype=torch.bfloat16)
    Path(TINY / "wanfast.json").write_text(json.dumps(SPEC.to_json(), indent=2) + "\n")


def draw(network: nn.Module, seed: int) -> None:
    """Every parameter from the seed: matrices at the scale of their fan-in, norms near one, the rest small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and not name.endswith("bias"):
            parameter.data = 1 + 0.1 * noise
        elif parameter.dim() >= 2 and "modulation" not in name:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * noise


if __name__ == "__main__":
    main()
