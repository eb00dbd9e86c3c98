"""Makes one expert of random weights in the original layout, and runs a forward pass of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests import sparse_model
from wanfast.bench.model_folder import randomise
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.store import model_files
from wanfast.runtime.weights import checkpoint


def write_expert(root: Path, spec: DiTSpec) -> model_files.ModelFiles:
    """Writes the high-noise expert in float32."""
    model = WanDiT(spec, torch.float32)
    randomise(model, seed=1)
    folder = root / "high_noise_model"
    checkpoint.save(model, folder / "whole.safetensors", network="dit", layout="original")
    (folder / "config.json").write_text(json.dumps(sparse_model.config(spec)))
    return model_files.locate(str(root), str(root.parent))


def velocity(model: WanDiT, latent: tuple[int, int, int] = (2, 4, 8), device: str = "cpu") -> Tensor:
    """Returns the velocity of a random latent of this many frames, rows and columns."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=device)

    noisy, condition = (normal(channels, *latent) for channels in (16, 20))
    text = model.encode_text(normal(7, model.spec.text_dim))
    frames, height, width = latent
    rope = rotary_tables((frames, height // 2, width // 2), model.spec.head_dim, device)
    out: Tensor = model(noisy, condition, torch.tensor([617], device=device), text, rope)[0]
    return out
