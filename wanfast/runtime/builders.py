"""One function per model: built on the meta device, filled from its files, ready to run.

Each states the dtype of its matrix products: the experts and UMT5 follow `--precision`; the VAE is always float32,
since its decoder draws the pixels and takes little of the time.
"""

from __future__ import annotations

from typing import Literal

import torch

from wanfast.runtime import checkpoint
from wanfast.runtime.config import Precision
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_expert(
    files: ModelFiles, expert: Literal["high_noise", "low_noise"], precision: Precision, device: str
) -> WanDiT:
    with torch.device("meta"):
        model = WanDiT(files.spec.dit, dtype=DTYPES[precision])
    checkpoint.load(model, files.weights(expert), component="dit", layout=files.layout, device=device)
    return model


def build_vae(files: ModelFiles, device: str) -> WanVAE:
    with torch.device("meta"):
        model = WanVAE(files.spec.vae, dtype=torch.float32)
    checkpoint.load(model, files.weights("vae"), component="vae", layout=files.layout, device=device)
    return model


def build_umt5(files: ModelFiles, precision: Precision, device: str) -> UMT5Encoder:
    with torch.device("meta"):
        model = UMT5Encoder(files.spec.umt5, dtype=DTYPES[precision])
    checkpoint.load(model, files.weights("umt5"), component="umt5", layout=files.layout, device=device)
    return model
