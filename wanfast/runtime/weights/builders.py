"""Builds the experts, the VAE and UMT5 on the meta device, shards them if asked, and fills them from their files.

The matrix products of the experts and of UMT5 have the dtype of `--precision`. The VAE's encoder is always float32, and
its decoder has the dtype of `--vae-precision`. A model is sharded before it is filled, so that a rank reads and holds
only its own rows. The projections q, k and v of an expert are fused into one linear layer. They stay separate if the
expert is sharded, or if ranks share the tokens of every forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
from wanfast.runtime.weights.checkpoint import MergeFn, Source, unmerged
from wanfast.runtime.weights.forms import source_of
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
    merge: MergeFn = unmerged,
) -> WanDiT:
    """Returns an expert with loaded weights; each forward splits its tokens among `ranks`.

    There are three ways to load:

    * `quantized` is None: reads the expert's files.
    * `quantized` is given, and `on_the_fly` is false: reads this artifact.
    * `quantized` is given, and `on_the_fly` is true: reads the expert's files, and quantizes the linear layers of the
      blocks during loading, by the scheme of `quantized`.

    `merge`: adds LoRAs to weights that are read from the expert's files; an artifact already contains its LoRAs.
    `attend`: the attention of the blocks. `sharded`: whether each rank holds only its own rows of the weights.
    `device`: the device of the weights; None means the rank's device. Raises MissingArtifactError or
    CorruptArtifactError.
    """
    scheme = quantized.scheme if quantized else None
    model = expert_on_meta(files.spec.dit, precision, ranks, attend=attend, scheme=scheme, sharded=sharded)
    source = _source(files, expert, ranks, None if on_the_fly else quantized, merge)
    checkpoint.load(model, source, ranks, device=device, on_the_fly=on_the_fly)
    if not sharded:
        model.fuse_projections()
    return model


def refill_expert(
    model: WanDiT,
    held: Mapping[str, Tensor],
    files: ModelFiles,
    expert: Expert,
    ranks: Ranks,
    *,
    quantized: QuantizedExpert | None,
    on_the_fly: bool,
    device: str | None,
    merge: MergeFn,
) -> None:
    """Overwrites the weights of a loaded expert with those that `build_expert` would load from the same arguments.

    `held`: the expert's tensors, by the names of its state dict.
    """
    source = _source(files, expert, ranks, None if on_the_fly else quantized, merge)
    checkpoint.refill(model, held, source, ranks, device=device, on_the_fly=on_the_fly)


def _source(files: ModelFiles, expert: Expert, ranks: Ranks, stored: QuantizedExpert | None, merge: MergeFn) -> Source:
    """Returns the artifact of a stored expert, which was merged before, or the files from which it would be made."""
    if stored is not None:
        return Source(shards(ranks.together(stored.require)), "dit", "original")
    return ranks.together(lambda: source_of(files, expert, ranks.mesh.size, merge))


def expert_on_meta(
    spec: DiTSpec, precision: Precision, ranks: Ranks, *, attend: AttentionFn, scheme: Scheme | None, sharded: bool
) -> WanDiT:
    """Returns an expert on the meta device, where its parameters have no values yet.

    If `scheme` has 8 bits, the linear layers of the expert's blocks are quantized layers. If `sharded` is true, the
    parameters are sharded.
    """
    dtype = DTYPES[precision]
    with on_meta():
        model = WanDiT(spec, dtype, ranks.sequence, attend)
        if in_8_bits(scheme):
            quantize_linears(model, scheme, dtype)
    if sharded:
        fsdp.shard(model, ranks.device)
    return model


def build_vae(files: ModelFiles, device: str, precision: Precision = "fp32") -> WanVAE:
    """Returns the VAE with loaded weights; its decoder has the dtype of `precision`, and its encoder has float32."""
    with on_meta():
        model = WanVAE(files.spec.vae, DTYPES[precision])
    checkpoint.load(model, Source(files.weights("vae"), "vae", files.layout), Ranks(device))
    model.lay_out()
    return model


def build_umt5(files: ModelFiles, precision: Precision, ranks: Ranks, *, sharded: bool = False) -> UMT5Encoder:
    with on_meta():
        model = UMT5Encoder(files.spec.umt5, dtype=DTYPES[precision])
    if sharded:
        fsdp.shard(model, ranks.device)
    checkpoint.load(model, Source(files.weights("umt5"), "umt5", files.layout), ranks)
    return model
