"""Maps tensor names of both public layouts (original, Diffusers) to our names; each network and layout has a table.

A table lists pairs (module path in the layout, our module path), where `{i}` stands for any index. Each table can be
read in both directions. Our names are those of the original layout, except for the VAE: its original names are only
indices in nested lists. `lora_part` reads the keys of LoRA files of any tool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Literal

from wanfast.runtime.facts.choices import Layout

Network = Literal["dit", "vae", "umt5"]
_Pairs = list[tuple[str, str]]


def rename(network: Network, layout: Layout, key: str) -> str:
    """Returns our name of the tensor `key` of a checkpoint in `layout`; unknown keys are returned unchanged."""
    return _substitute(key, key_map(network, layout))


def rename_back(network: Network, layout: Layout, name: str) -> str:
    """Returns the name that a checkpoint in `layout` has for our tensor `name`: the inverse of `rename`."""
    return _substitute(name, [(ours, theirs) for theirs, ours in key_map(network, layout)])


def _substitute(key: str, pairs: _Pairs) -> str:
    for source, target in pairs:
        if match := _pattern(source).match(key):
            head, *rest = target.split("{i}")
            indexed = head + "".join(index + part for index, part in zip(match.groups(), rest, strict=True))
            return indexed + key[match.end() :]
    return key


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)")


@cache
def key_map(network: Network, layout: Layout) -> _Pairs:
    """Returns the table of pairs (module path in the layout, our module path), for paths that differ."""
    tables: Mapping[tuple[Network, Layout], Callable[[], _Pairs]] = {
        ("dit", "diffusers"): _dit_diffusers,
        ("umt5", "diffusers"): _umt5_diffusers,
        ("vae", "original"): _vae_original,
        ("vae", "diffusers"): _vae_diffusers,
    }
    return tables.get((network, layout), list)()


def _dit_diffusers() -> _Pairs:
    attentions = [
        (f"blocks.{{i}}.{theirs}.{their_part}", f"blocks.{{i}}.{ours}.{our_part}")
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for their_part, our_part in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    ] + [
        (f"blocks.{{i}}.{theirs}.{norm}", f"blocks.{{i}}.{ours}.{norm}")
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    ]
    return [
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        ("scale_shift_table", "head.modulation"),
        ("blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
        ("blocks.{i}.norm2", "blocks.{i}.norm3"),  # the norm before cross-attention: the only one with weights
        ("blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
        ("blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
        *attentions,
    ]


def _umt5_diffusers() -> _Pairs:
    attention, feed_forward = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    return [
        ("shared", "token_embedding"),
        ("encoder.final_layer_norm", "norm"),
        (f"{attention}.layer_norm", "blocks.{i}.norm1"),
        *((f"{attention}.SelfAttention.{part}", f"blocks.{{i}}.attn.{part}") for part in "qkvo"),
        (f"{attention}.SelfAttention.relative_attention_bias", "blocks.{i}.pos_embedding.embedding"),
        (f"{feed_forward}.layer_norm", "blocks.{i}.norm2"),
        (f"{feed_forward}.DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0"),
        (f"{feed_forward}.DenseReluDense.wi_1", "blocks.{i}.ffn.fc1"),
        (f"{feed_forward}.DenseReluDense.wo", "blocks.{i}.ffn.fc2"),
    ]


_VAE_SEQUENCES = ("encoder.downsamples.{i}", "encoder.middle.{i}", "decoder.middle.{i}", "decoder.upsamples.{i}")


def _vae_original() -> _Pairs:
    residual = (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"))
    return [
        ("conv1", "quant_conv"),
        ("conv2", "post_quant_conv"),
        *(
            (f"{half}.{theirs}", f"{half}.{ours}")
            for half in ("encoder", "decoder")
            for theirs, ours in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
        ),
        *((f"{block}.{theirs}", f"{block}.{ours}") for block in _VAE_SEQUENCES for theirs, ours in residual),
        *((f"{block}.resample.1", f"{block}.resample") for block in (_VAE_SEQUENCES[0], _VAE_SEQUENCES[3])),
    ]


def _vae_diffusers() -> _Pairs:
    sequences = [("encoder.down_blocks.{i}", "encoder.downsamples.{i}")]
    for half in ("encoder", "decoder"):
        sequences += [
            (f"{half}.mid_block.resnets.0", f"{half}.middle.0"),
            (f"{half}.mid_block.attentions.0", f"{half}.middle.1"),
            (f"{half}.mid_block.resnets.1", f"{half}.middle.2"),
        ]
    for n in range(16):  # a level is three residual blocks and, except in the last level, an upsampling
        level, j = divmod(n, 4)
        part = f"resnets.{j}" if j < 3 else "upsamplers.0"
        sequences.append((f"decoder.up_blocks.{level}.{part}", f"decoder.upsamples.{n}"))
    parts = [("conv_shortcut", "shortcut"), ("resample.1", "resample")]
    # longer paths come first, because `_substitute` takes the first match
    return [(f"{theirs}.{t}", f"{ours}.{o}") for theirs, ours in sequences for t, o in parts] + sequences


LoraPart = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b", "diff_m"]

_LORA_PREFIX = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:(?:model\.)?diffusion_model\.|pipe\.dit\.|transformer(?:_2)?\.|lora_unet__?|lycoris_)?"
)
_LORA_ENDINGS: Mapping[LoraPart, re.Pattern[str]] = {
    "down": re.compile(r"\.lora_(?:down|A)(?:\.\w+)?\.weight"),  # PEFT may add the name of the adapter
    "up": re.compile(r"\.lora_(?:up|B)(?:\.\w+)?\.weight"),
    "up_bias": re.compile(r"\.lora_(?:up|B)(?:\.\w+)?\.bias"),
    "alpha": re.compile(r"\.alpha"),
    "diff": re.compile(r"\.diff"),
    "diff_b": re.compile(r"\.diff_b"),
    "diff_m": re.compile(r"\.diff_m"),
}
_BIASES: tuple[str, ...] = (".bias",)
_CHANGED: Mapping[LoraPart, tuple[str, ...]] = {  # the endings of the parameter that a part changes
    "diff": (".weight", ""),
    "up_bias": _BIASES,
    "diff_b": _BIASES,
    "diff_m": (".modulation", "_modulation", ""),
}


def lora_spellings(names: Iterable[str]) -> dict[str, str]:
    """Returns {name that a LoRA file may use: our name} for the expert's parameters.

    `names`: our names of the parameters. A LoRA file may use the names of the original layout or of Diffusers' layout,
    and may write the dots of a module's path as underscores.
    """
    spellings: dict[str, str] = {}
    for name in names:
        for spelling in (name, rename_back("dit", "diffusers", name)):
            path, ending = re.fullmatch(r"(.*?)(\.weight|\.bias|)", spelling).groups()  # type: ignore[union-attr]
            spellings |= {spelling: name, path.replace(".", "_") + ending: name}
    return spellings


def lora_part(key: str, spellings: Mapping[str, str]) -> tuple[str, LoraPart, str] | None:
    """Returns (module's path in the file, part, our name of the parameter) of a LoRA's key.

    The part says what the key's tensor is, such as "down" or "alpha". `spellings`: the result of `lora_spellings`.
    Returns None if the key has no known part, or if the expert has no such parameter.
    """
    rest = key[_LORA_PREFIX.match(key).end() :]  # type: ignore[union-attr]  # it matches the empty text too
    for part, ending in _LORA_ENDINGS.items():
        if match := re.fullmatch(f"(.*){ending.pattern}", rest):
            path = match[1]
            changed = (spellings.get(path + each) for each in _CHANGED.get(part, (".weight",)))
            return next(((path, part, name) for name in changed if name), None)
    return None
