"""One function per model: built on the meta device, shared out, filled from its files, ready to run.

Each states the dtype of its matrix products: the experts and UMT5 follow `--precision`; the VAE is always float32,
since its decoder draws the pixels and takes little of the time. What is sharded is sharded while on meta, so that a
rank reads and holds its own rows alone; q, k and v of weights that are whole become one product.
"""

from __future__ import annotations

import torch

from wanfast.runtime.device.meta import on_meta
from wanfast.runtime.distributed import fsdp
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.facts.choices import Expert, Precision, Scheme, in_8_bits
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.attention import attention
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, shards
from wanfast.runtime.weights import checkpoint
from wanfast.runtime.weights.quantization import quantize_linears

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_expert(
    files: ModelFiles,
    expert: Expert,
    precision: Precision,
    ranks: Ranks,
    *,
    attend: AttentionFn = attention,
    quantized: QuantizedExpert | None = None,
    on_the_fly: bool = False,
    sharded: bool = False,
    device: str | None = None,
) -> WanDiT:
    """An expert that shares tokens among `ranks`; on another `device` than theirs if one is named.

    `quantized`: by its scheme, from its artifact or, `on_the_fly`, from the files. Raises MissingArtifactError.
    """
    layout, scheme = files.layout, quantized.scheme if quantized else None
    model = expert_on_meta(files.spec.dit, precision, ranks, attend=attend, scheme=scheme, sharded=sharded)
    if quantized and not on_the_fly:
        weights, layout = shards(ranks.together(quantized.require)), "original"
    else:
        weights = files.weights(expert)
    checkpoint.load(model, weights, component="dit", layout=layout, ranks=ranks, device=device, on_the_fly=on_the_fly)
    if not sharded:
        model.fuse_projections()
    return model


def expert_on_meta(
    spec: DiTSpec, precision: Precision, ranks: Ranks, *, attend: AttentionFn, scheme: Scheme | None, sharded: bool
) -> WanDiT:
    """An expert that holds nothing yet, in the form in which it will run: what `wanfast warmup` compiles too."""
    dtype = DTYPES[precision]
    with on_meta():
        model = WanDiT(spec, dtype, ranks.sequence, attend)
        if in_8_bits(scheme):
            quantize_linears(model, scheme, dtype)
    if sharded:
        fsdp.shard(model, ranks.device)
    return model


def build_vae(files: ModelFiles, device: str, precision: Precision = "fp32") -> WanVAE:
    """Returns the VAE; `precision` is the decoder's."""
    with on_meta():
        model = WanVAE(files.spec.vae, DTYPES[precision])
    checkpoint.load(model, files.weights("vae"), component="vae", layout=files.layout, ranks=Ranks(device))
    model.lay_out()
    return model


def build_umt5(files: ModelFiles, precision: Precision, ranks: Ranks, *, sharded: bool = False) -> UMT5Encoder:
    with on_meta():
        model = UMT5Encoder(files.spec.umt5, dtype=DTYPES[precision])
    if sharded:
        fsdp.shard(model, ranks.device)
    checkpoint.load(model, files.weights("umt5"), component="umt5", layout=files.layout, ranks=ranks)
    return model
