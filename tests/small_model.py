"""Writes a small random model with eight heads, in the Diffusers layout: every mesh of up to eight ranks fits it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from wanfast.bench.model_folder import randomise
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.pixels import Frames
from wanfast.runtime.facts.choices import BRANCHES, Branch
from wanfast.runtime.facts.model_spec import T2V_A14B, DiTSpec, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store.model_files import TINY, ModelFiles, locate
from wanfast.runtime.weights import checkpoint

SPEC = ModelSpec(
    name="small",
    dit=DiTSpec(dim=160, ffn_dim=200, num_heads=8, num_layers=2, freq_dim=64, text_dim=40, text_len=16),
    vae=VAESpec(base_dim=8),
    umt5=UMT5Spec(vocab_size=960, dim=40, attention_dim=32, ffn_dim=48, num_heads=4, num_layers=2),
    size="96x64",
    frames=5,
    steps=4,
)


TEXT_SPEC = dataclasses.replace(  # of the kind that makes videos from text alone
    T2V_A14B,
    name="small text",
    dit=dataclasses.replace(SPEC.dit, in_channels=T2V_A14B.dit.in_channels),
    **{part: getattr(SPEC, part) for part in ("vae", "umt5", "boundary", "shift", "size", "frames", "steps")},
)


def write_small_model(folder: Path, spec: ModelSpec = SPEC) -> Path:
    weights = "diffusion_pytorch_model.safetensors"
    parts: tuple[tuple[nn.Module, checkpoint.Network, str], ...] = (
        (WanDiT(spec.dit), "dit", f"transformer/{weights}"),
        (WanDiT(spec.dit), "dit", f"transformer_2/{weights}"),
        (WanVAE(SPEC.vae), "vae", f"vae/{weights}"),
        (UMT5Encoder(SPEC.umt5), "umt5", "text_encoder/model.safetensors"),
    )
    for seed, (module, network, file) in enumerate(parts):
        randomise(module.float(), seed)
        checkpoint.save(module, folder / file, network=network, layout="diffusers")
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY / "tokenizer/tokenizer.json", folder / "tokenizer")
    (folder / "wanfast.json").write_text(json.dumps(spec.to_json()))
    return folder


def plan_small_model(folder: Path, **options: object) -> tuple[Plan, ModelFiles]:
    """Of unequal guidance, in float32 on a CPU."""
    own = {"prompt": "a cat", "seed": 7, "precision": "fp32", "device": "cpu"}
    own |= {"image": "cat.png"} if locate(str(folder), "").spec.takes_images else {}
    guidance = {"guidance_high_noise": 2.0, "guidance_low_noise": 3.5}
    return resolve({"model": str(folder), **own, **guidance, **options})


def blank_inputs(plan: Plan, files: ModelFiles) -> tuple[Tensor, dict[Branch, Tensor]]:
    """Returns a pipeline's inputs: a grey image if the model takes one, and random text embeddings."""
    images = torch.zeros(int(files.spec.takes_images), 3, plan.geometry.height, plan.geometry.width)
    return images, {branch: torch.randn(4, files.spec.dit.text_dim) for branch in BRANCHES}


def frames_of(pipeline: VideoPipeline, plan: Plan, images: Tensor, text: dict[Branch, Tensor]) -> Frames | None:
    """Returns the frames that a session makes of these inputs on a CPU; None on all ranks except the leader."""
    latent = pipeline.latent(plan, images, text, Stopwatch("cpu"), lambda done, expert: None, plan.residuals())
    return pipeline.frames(latent, plan.geometry, Stopwatch("cpu"))
