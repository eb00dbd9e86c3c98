"""Loads the experts and the VAE of a rank, and replaces the LoRAs of loaded experts.

The docstring of `load_models` lists the steps in which a model is loaded, and the reasons for their order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from wanfast.runtime.config import EffectiveConfig, ModelsConfig
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.compilation import compile_blocks, compiler_imported_meanwhile
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import EXPERTS, LOSSY_ATTENTION, Attention, Expert
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.store.expert_files import identified
from wanfast.runtime.store.loras import inputs_of, loras_of
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, quantized_expert
from wanfast.runtime.weights.builders import DTYPES, build_expert, build_vae, refill_expert
from wanfast.runtime.weights.checkpoint import MergeFn
from wanfast.runtime.weights.experts import Experts, OffloadedExperts, ResidentExperts
from wanfast.runtime.weights.lora import merge_of


def load_models(
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
    before_each: Callable[[], None] = lambda: None,
) -> VideoPipeline:
    """Loads both experts and the VAE, and returns a pipeline that is ready to run.

    The seconds of loading are added to `loads`, for each of these three models. Every rank calls `before_each` before
    it loads each model. Raises WanFastError. An expert is loaded in seven steps; `build_expert` does the first five:

    1. build on the meta device, so that no memory is allocated yet;
    2. quantize: 8-bit layers replace linear layers before weights are read, so that only 8-bit weights are allocated;
    3. shard: parameters are sharded before weights are read, so that a rank reads only its own rows;
    4. fill the parameters from the files: each tensor is merged with its LoRAs while it is read;
    5. fuse the projections q, k and v; nothing is fused if weights are sharded or if ranks share the tokens in every
       forward;
    6. place both experts, resident or offloaded, after both are filled, because offloaded experts share one set of GPU
       weights;
    7. compile, last, because the compiler needs the final parameters.
    """
    wanted = config.models
    dtype = DTYPES[wanted.precision]
    choice = attention_probe.agree(wanted.attention, ranks, dtype, files.spec.dit.head_dim)
    attend = attention_by(choice.exact)
    lossy = lossy_attention(choice.kernel, attend, files.spec.dit.num_heads, ranks)
    merges = ranks.together(lambda: merges_of(files, wanted))

    def build(expert: Expert) -> WanDiT:
        before_each()
        with loads.span(expert):
            return build_expert(
                files,
                expert,
                wanted.precision,
                ranks,
                attend=attend,
                sharded=config.ranks.dit_fsdp == "on",
                **_filling(files, config, expert, merges),
            )

    with compiler_imported_meanwhile(config):
        models: dict[Expert, WanDiT] = {"high_noise": build("high_noise"), "low_noise": build("low_noise")}
        experts = _place(models, config, ranks)
        before_each()
        with loads.span("vae"):
            decoder = wanted.vae_precision or wanted.precision
            vae = ranks.together(lambda: build_vae(files, ranks.device, decoder))
    if lossy:
        for model in models.values():
            lossy.use_in(model)
    if wanted.compile:
        for model in models.values():
            compile_blocks(model, wanted.compile_mode)
    return VideoPipeline(files.spec, experts, vae, ranks, choice, lossy)


def lossy_attention(kernel: Attention, dense: AttentionFn, num_heads: int, ranks: Ranks) -> LossyAttention | None:
    """Returns the object that computes self-attention by `kernel`; returns None if `kernel` is exact.

    `dense` computes the calls that stay exact. `num_heads` counts the heads of all ranks.
    """
    if kernel not in LOSSY_ATTENTION:
        return None
    if kernel == "sparse":
        return SparseAttention(dense, num_heads, ranks)
    assert kernel == "fa3-fp8", f"no class computes lossy attention by {kernel}: name its class here"
    return Fp8Attention(num_heads, ranks)


def replace_loras(
    experts: Experts,
    old: ModelsConfig,
    merges: dict[Expert, MergeFn],
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
) -> None:
    """Replaces the LoRAs of the loaded experts with the LoRAs of `config`, for which `merges_of` returned `merges`.

    `old`: the options with which the experts were loaded. An expert is read again only if its LoRAs in `old` differ
    from its LoRAs in `config`. The seconds of reading are added to `loads`. Raises WanFastError.
    """
    for expert in EXPERTS:
        if inputs_of(loras_of(old), expert) != inputs_of(loras_of(config.models), expert):
            with loads.span(expert):
                model, held = experts.writable(expert)
                refill_expert(model, held, files, expert, ranks, **_filling(files, config, expert, merges))


class _Filling(TypedDict):
    """Says how an expert's parameters are filled."""

    quantized: QuantizedExpert | None
    on_the_fly: bool
    device: str | None
    merge: MergeFn


def _filling(files: ModelFiles, config: EffectiveConfig, expert: Expert, merges: dict[Expert, MergeFn]) -> _Filling:
    return {
        "quantized": quantized_expert(files, config.models, expert),
        "on_the_fly": config.models.quantize_on_the_fly,
        "device": "cpu" if config.ranks.expert_offload == "on" else None,
        "merge": merges[expert],
    }


def _place(models: dict[Expert, WanDiT], config: EffectiveConfig, ranks: Ranks) -> Experts:
    if config.ranks.expert_offload == "on":
        return OffloadedExperts(models, ranks.device)
    may_move = config.models.compile_mode != "max-autotune" or ranks.size == 1
    return ResidentExperts(models, ranks.device, may_move=may_move)


def merges_of(files: ModelFiles, models: ModelsConfig) -> dict[Expert, MergeFn]:
    """Returns for each expert the function that merges its LoRAs.

    The LoRAs of both experts are checked before a weight is read, and so are the files of experts that options name.
    Raises CorruptArtifactError if a LoRA does not fit the model, and ConfigError if a file changed since the plan was
    made.
    """
    if (now := identified(models)) != models:
        whose = "a LoRA" if now.expert_sha256 == models.expert_sha256 else "an expert"
        raise ConfigError(f"the file of {whose} changed since the plan was made: run this command again")
    return {expert: merge_of(loras_of(models), expert, files.spec.dit) for expert in EXPERTS}


def stored_experts(files: ModelFiles, models: ModelsConfig) -> dict[str, Path]:
    """Returns {expert: folder of its artifact} for each expert that is read from an artifact of quantized weights."""
    if models.quantize_on_the_fly:
        return {}
    return {name: expert.require() for name in EXPERTS if (expert := quantized_expert(files, models, name))}
