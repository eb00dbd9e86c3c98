"""Writes the trained networks as a model folder: Diffusers layout, bf16, and the model's spec in wanfast.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from training.train_experts import TinyModel
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import TINY
from wanfast.runtime.weights import checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export(spec: ModelSpec, model: TinyModel, vae: WanVAE, folder: Path) -> None:
    parts = (
        (model.high_noise, "dit", f"transformer/{WEIGHTS}"),
        (model.low_noise, "dit", f"transformer_2/{WEIGHTS}"),
        (vae, "vae", f"vae/{WEIGHTS}"),
        (model.umt5, "umt5", "text_encoder/model.safetensors"),
    )
    for module, network, file in parts:
        checkpoint.save(module, folder / file, network=network, layout="diffusers", dtype=torch.bfloat16)
    (folder / "wanfast.json").write_text(json.dumps(spec.to_json(), indent=2) + "\n")
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer/tokenizer.json", folder / "tokenizer/tokenizer.json")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)
