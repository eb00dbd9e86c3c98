"""Reads the facts of a model from the JSON files beside its weights, and checks each of them.

Facts are a model's sizes and its default options. A `wanfast.json` holds all facts. Without this file, the config files
of both public layouts (the original one and Diffusers') give the sizes of the transformer. The config files of
Diffusers' layout also give the sizes of the VAE and UMT5, and the noise boundary. An error names the file and the key.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wanfast.runtime.config import OPTIONS
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.facts.model_spec import (
    A14B,
    DiTSpec,
    FactError,
    ModelSpec,
    UMT5Spec,
    VAESpec,
    as_tuple,
    is_size,
    published_like,
)
from wanfast.runtime.store.hub_cache import name_of
from wanfast.runtime.store.json_files import read_object

T = TypeVar("T")

_FACTS_FILE = "wanfast.json"
AGAIN = "make this JSON file readable, or download it again"


@dataclass(frozen=True, kw_only=True)
class Places:
    """This class holds the path of each component in one layout, relative to a model's folder.

    Each path leads to a folder of shards or to a single file.
    """

    high_noise: str
    low_noise: str
    vae: str
    umt5: str
    tokenizer: str


def read_spec(root: Path, places: Places, published: ModelSpec = A14B) -> ModelSpec:
    """Returns a model's facts, which wanfast.json in the model's folder `root` holds.

    Without wanfast.json, the config files at `places` give most sizes, and model_index.json gives the noise boundary.
    All other facts are copied from a published model. If the transformer has no config file, that model is `published`.
    Otherwise it is `A14B` if the transformer takes images, and `T2V_A14B` if it does not.
    Raises CorruptArtifactError, which names the file and the key.
    """
    if document := _read_facts(root / _FACTS_FILE):
        return _checked(root / _FACTS_FILE, document, lambda facts: _with_defaults(ModelSpec.from_json(facts)))
    found: dict[str, Any] = {"name": name_of(root)}
    readers: tuple[tuple[str, str, Any], ...] = (
        ("dit", places.high_noise, _dit_spec),
        ("vae", places.vae, _vae_spec),
        ("umt5", places.umt5, _umt5_spec),
    )
    for part, folder, read in readers:
        config = root / folder / "config.json"
        if document := _read_facts(config):
            found[part] = _checked(config, document, read)
    index = root / "model_index.json"
    boundary = (_read_facts(index) or {}).get("boundary_ratio")
    if boundary is not None:
        found["boundary"] = boundary
    base = published_like(found["dit"]) if "dit" in found else published
    return _checked(index, found, lambda facts: dataclasses.replace(base, **facts))


def _with_defaults(spec: ModelSpec) -> ModelSpec:
    """Returns the spec if each option accepts the model's own default. Raises FactError."""
    for name, option in OPTIONS.items():
        if option.option.own:
            try:
                option.accept(getattr(spec, name))
            except ConfigError as error:
                raise FactError(name, getattr(spec, name), str(error)) from None
    return spec


def _checked(file: Path, document: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
    """Returns what `read` makes of a document. Raises CorruptArtifactError, which names the file and the key."""
    try:
        return read(document)
    except KeyError as error:
        raise CorruptArtifactError(f"{file}: the key {error} is missing: download this file again") from None
    except FactError as error:
        raise CorruptArtifactError(f"{file}: {error}: fix this file, or copy it again") from None


def _read_facts(file: Path) -> dict[str, Any] | None:
    """Returns the document of a file of facts, or None if there is no such file. Raises CorruptArtifactError."""
    with foreign(str(file), "make the file readable", CorruptArtifactError):
        if not file.is_file():
            return None
    return read_object(file, AGAIN)


def _dit_spec(config: dict[str, Any]) -> DiTSpec:
    if "dim" in config:  # the original layout
        return _named(DiTSpec, config, _DIT_ORIGINAL, text_dim=config.get("text_dim", A14B.dit.text_dim))
    return _named(DiTSpec, config, _DIT_DIFFUSERS, dim=_product(config, "num_attention_heads", "attention_head_dim"))


def _vae_spec(config: dict[str, Any]) -> VAESpec:
    return _named(VAESpec, config, _VAE)


def _umt5_spec(config: dict[str, Any]) -> UMT5Spec:
    return _named(UMT5Spec, config, _UMT5, attention_dim=_product(config, "num_heads", "d_kv"))


def _named(kind: Callable[..., T], config: dict[str, Any], keys: dict[str, str], **more: Any) -> T:
    """Returns a spec whose facts stand under other keys in the file. Raises KeyError, and FactError with the key."""
    try:
        return kind(**{name: as_tuple(config[key]) for name, key in keys.items()}, **more)
    except FactError as error:
        raise FactError(keys.get(error.name, error.name), error.value, error.needed) from None


def _product(config: dict[str, Any], first: str, second: str) -> int:
    for key in (first, second):
        if not is_size(config[key]):
            raise FactError(key, config[key], "a whole number of at least 1 is needed")
    product: int = config[first] * config[second]
    return product


_SAME = ("ffn_dim", "freq_dim", "num_layers", "eps")
# {our fact: the key of the file}
_DIT_ORIGINAL = {name: name for name in ("dim", "num_heads", "text_len", *_SAME)} | {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
}
_DIT_DIFFUSERS = {name: name for name in ("in_channels", "out_channels", "text_dim", "patch_size", *_SAME)} | {
    "num_heads": "num_attention_heads"
}
_VAE = {name: name for name in ("base_dim", "dim_mult", "num_res_blocks", "latents_mean", "latents_std")} | {
    "latent_channels": "z_dim",
    "temporal_downsample": "temperal_downsample",  # spelled this way in the file
}
_UMT5 = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "ffn_dim": "d_ff",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
