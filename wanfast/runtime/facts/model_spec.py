"""Holds the facts of a model: the sizes of its networks, the experts' noise boundary and its default options.

`A14B` is Wan2.2-I2V-A14B as published, and `T2V_A14B` is Wan2.2-T2V-A14B, which makes videos from text alone. A folder
with another model may contain a `wanfast.json` with all facts, in the form that `ModelSpec.to_json` returns. Without
this file, `store.model_facts` reads the sizes of networks from the folder's `config.json` files, and the noise boundary
from a `model_index.json`. All other facts are then those of `A14B` if the folder's model takes images, and those of
`T2V_A14B` if it does not. In both public layouts (original and Diffusers), the transformer has a `config.json`.
Source: the configuration files and code of Wan-Video/Wan2.2 (42bf4cf).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from wanfast.runtime.facts.choices import MagCacheRule


class FactError(ValueError):
    """This error means that a fact (a size or default of a model) has a wrong type or an impossible value."""

    def __init__(self, name: str, value: object, needed: str) -> None:
        super().__init__(f"{name} {value!r:.60}: {needed}")
        self.name, self.value, self.needed = name, value, needed


class _Facts:
    """Checks each fact by the type of its field, and then what belongs together. Raises FactError."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            fits, needed = _KINDS[str(each.type)]
            if not fits(getattr(self, each.name)):
                raise FactError(each.name, getattr(self, each.name), needed)
        self._check()

    def _check(self) -> None:
        """Checks what belongs together."""

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as a JSON document, in which tuples have become lists."""
        document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]
        return document

    def _require(self, name: str, fits: bool, needed: str) -> None:
        if not fits:
            raise FactError(name, getattr(self, name), needed)


def is_size(value: object) -> bool:
    """Returns whether a value is an int from 1 to 2^24, the range of sizes in a model; returns False for a bool."""
    return type(value) is int and 1 <= value <= _MOST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -1e6 <= value <= 1e6  # type: ignore[operator]  # false for NaN


def _all(fits: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 1024 and all(map(fits, value))


_MOST = 1 << 24
_PARTS = ("DiTSpec", "VAESpec", "UMT5Spec")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (is_size, f"a whole number, 1 to {_MOST}, is needed"),
    "int | None": (lambda value: value is None or is_size(value), "a whole number or null is needed"),
    "float": (_is_number, "a number is needed"),
    "float | None": (lambda value: value is None or _is_number(value), "a number or null is needed"),
    "str": (lambda value: isinstance(value, str), "a text is needed"),
    "str | None": (lambda value: value is None or isinstance(value, str), "a text or null is needed"),
    "tuple[int, int, int]": (lambda value: _all(is_size, value) and len(value) == 3, "three whole numbers are needed"),
    "tuple[int, ...]": (lambda value: _all(is_size, value), "a list of whole numbers is needed"),
    "tuple[float, ...]": (lambda value: _all(_is_number, value), "a list of numbers is needed"),
    "tuple[bool, ...]": (
        lambda value: _all(lambda each: type(each) is bool, value),
        "a list of true and false is needed",
    ),
    "MagCacheRule": (lambda value: value in get_args(MagCacheRule), f"use {' or '.join(get_args(MagCacheRule))}"),
    **{name: (lambda value: isinstance(value, _Facts), "an object is needed") for name in _PARTS},
}


@dataclass(frozen=True, kw_only=True)
class DiTSpec(_Facts):
    """This class holds the sizes of one expert, which is a diffusion transformer over a latent video."""

    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    in_channels: int = 36  # 16 noisy latent + 4 mask + 16 encoded frames; 16 without images
    out_channels: int = 16
    num_heads: int = 40
    num_layers: int = 40
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def takes_images(self) -> bool:
        """Returns whether the expert takes images, in addition to the noisy latent."""
        return self.in_channels > self.out_channels

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def _check(self) -> None:
        heads_fit = self.dim % (2 * self.num_heads) == 0
        self._require("num_heads", heads_fit, f"{self.dim} channels must divide into heads of equal and even size")
        self._require("freq_dim", self.freq_dim % 2 == 0, "an even number is needed")
        self._require("num_layers", self.num_layers <= 1000, "at most 1000 are possible")
        self._require("text_len", self.text_len <= 65536, "at most 65536 tokens are possible")
        self._require(
            "patch_size",
            self.patch_size[0] == 1 and max(self.patch_size) <= 16,
            "the first number must be 1, and the others at most 16",
        )
        self._require("eps", 0 < self.eps < 1, "a number between 0 and 1 is needed")


# Per-channel statistics of the latents of the Wan 2.1 VAE: normalised latent = (latent - mean) / std.
_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VAESpec(_Facts):
    """This class holds the sizes of the causal video VAE, and the mean and std of its latents.

    By default, the latents are smaller than the video: 4x in time, 8x in height and 8x in width. The latents have 16
    channels.
    """

    base_dim: int = 96
    latent_channels: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _LATENTS_MEAN
    latents_std: tuple[float, ...] = _LATENTS_STD

    @property
    def temporal_stride(self) -> int:
        return 1 << sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        return 1 << len(self.temporal_downsample)

    def _check(self) -> None:
        levels, channels = len(self.temporal_downsample), self.latent_channels
        self._require(
            "temporal_downsample",
            self.temporal_stride in (2, 4) and levels <= 8,
            "use at most 8 values; one or two must be true",
        )
        self._require("dim_mult", len(self.dim_mult) == levels + 1, f"{levels + 1} numbers are needed")
        self._require("latents_mean", len(self.latents_mean) == channels, f"{channels} numbers are needed")
        self._require("latents_std", len(self.latents_std) == channels, f"{channels} numbers are needed")
        self._require("latents_std", min(self.latents_std) > 0, "numbers over 0 are needed")
        self._require("num_res_blocks", self.num_res_blocks <= 100, "at most 100 are possible")


@dataclass(frozen=True, kw_only=True)
class UMT5Spec(_Facts):
    """This class holds the sizes of the text encoder, which is the encoder half of UMT5-XXL."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def _check(self) -> None:
        fits = self.attention_dim % self.num_heads == 0
        self._require("num_heads", fits, f"use a number of heads that divides {self.attention_dim}")
        self._require("num_layers", self.num_layers <= 1000, "at most 1000 are possible")
        self._require("num_buckets", 4 <= self.num_buckets <= 65536, "4 to 65536 are possible")
        self._require(
            "max_distance", self.max_distance > self.num_buckets // 4, "it must be larger than a quarter of num_buckets"
        )
        self._require("eps", 0 < self.eps < 1, "a number between 0 and 1 is needed")


# The publisher's own, against videos that are garish, overexposed, still, blurred, subtitled, badly drawn, malformed.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Facts):
    """This class holds the facts of a model: its sizes, and the defaults that its publisher chose."""

    name: str = "Wan2.2-I2V-A14B"
    weights_note: str | None = None  # reported with every result, e.g. that the weights were never trained
    dit: DiTSpec = field(default_factory=DiTSpec)
    vae: VAESpec = field(default_factory=VAESpec)
    umt5: UMT5Spec = field(default_factory=UMT5Spec)
    boundary: float = 0.9  # the high-noise expert takes timesteps >= boundary * 1000
    size: str = "1280x720"
    frames: int = 81
    steps: int = 40
    shift: float = 5.0
    shift_480p: float | None = 3.0  # the publisher's advice for 832x480; the default is `shift` at every size
    guidance_high_noise: float = 3.5
    guidance_low_noise: float = 3.5
    trained_frames: int | None = 81  # the longest clips that the model has seen
    fps: int = 16
    magcache_rule: MagCacheRule = "low-noise-only"  # by which MagCache's authors skip with their curve of this model
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT

    @property
    def takes_images(self) -> bool:
        """Returns whether the model makes videos from images; otherwise it makes them from text alone."""
        return self.dit.takes_images

    @property
    def needs_gpu(self) -> bool:
        """Returns whether a CPU is too slow for this model: True for every model except tiny."""
        return self.name != "tiny"

    def _check(self) -> None:
        self._require("boundary", 0 <= self.boundary <= 1, "a number from 0 to 1 is needed")

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ModelSpec:
        """Builds a spec from a document that `to_json` made; facts that are not in the document have A14B's values.

        Raises FactError if a name is unknown or a value is wrong.
        """
        parts = {"dit": DiTSpec, "vae": VAESpec, "umt5": UMT5Spec}
        known = {k: v for k, v in document.items() if k != "repo_id"}  # older files have this key, and nothing reads it
        facts = {k: _built(parts[k], v, f"{k}.") if k in parts else v for k, v in known.items()}
        spec: ModelSpec = _built(cls, facts)
        return spec


def _built(kind: Any, facts: Any, prefix: str = "") -> Any:
    """Returns a spec of `kind` with these facts, whose names get `prefix` in an error. Raises FactError."""
    if not isinstance(facts, dict):
        raise FactError(prefix.removesuffix("."), facts, "a JSON object with sizes or defaults of the model is needed")
    if unknown := sorted(facts.keys() - {each.name for each in dataclasses.fields(kind)}):
        raise FactError(
            prefix + unknown[0],
            facts[unknown[0]],
            "no size or default of a model has this name: correct or remove the name",
        )
    try:
        return kind(**{name: as_tuple(value) for name, value in facts.items()})
    except FactError as error:
        raise FactError(prefix + error.name, error.value, error.needed) from None


def as_tuple(value: Any) -> Any:
    """Converts a list to a tuple; returns any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value


A14B = ModelSpec()
T2V_A14B = ModelSpec(
    name="Wan2.2-T2V-A14B",
    dit=DiTSpec(in_channels=16),
    boundary=0.875,
    shift=12.0,
    shift_480p=None,
    guidance_high_noise=4.0,
    guidance_low_noise=3.0,
    magcache_rule="both-experts",
)
PUBLISHED: Mapping[str, ModelSpec] = MappingProxyType({"a14b": A14B, "t2v-a14b": T2V_A14B})  # by the value of --model


def published_like(dit: DiTSpec) -> ModelSpec:
    """Returns `A14B` if a transformer of these sizes takes images, otherwise `T2V_A14B`."""
    return next(spec for spec in PUBLISHED.values() if spec.takes_images == dit.takes_images)
