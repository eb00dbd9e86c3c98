"""Holds the facts of a model: the sizes of its four networks, the expert boundary and the reference's defaults.

`A14B` is Wan2.2-I2V-A14B as published. Any other model states its facts in a `wanfast.json` beside its weights
(`ModelSpec.to_json`), or only its networks' sizes in `config.json`. Both public layouts have the transformer's.
Source: the configuration files and code of Wan-Video/Wan2.2 (42bf4cf).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DiTSpec:
    """This class holds the sizes of one expert, which is a diffusion transformer over a latent video."""

    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    in_channels: int = 36  # 16 noisy latent + 4 mask + 16 encoded first frame
    out_channels: int = 16
    num_heads: int = 40
    num_layers: int = 40
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


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
class VAESpec:
    """This class holds the sizes of the causal video VAE, which compresses 4x8x8 (T, H, W) into 16 channels."""

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


@dataclass(frozen=True, kw_only=True)
class UMT5Spec:
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


# The makers' own, against videos that are garish, overexposed, still, blurred, subtitled, badly drawn, malformed.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """This class holds the facts of an image-to-video model and the defaults that its makers chose."""

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
    shift_480p: float | None = 3.0  # the makers' advice for 832x480; the default is `shift` at every size
    guidance_high_noise: float = 3.5
    guidance_low_noise: float = 3.5
    trained_frames: int | None = 81  # the longest clips that the model has seen
    fps: int = 16
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ModelSpec:
        """Builds a spec from a document that `to_json` made; absent facts are A14B's.

        Raises TypeError for an unknown fact.
        """
        parts = {"dit": DiTSpec, "vae": VAESpec, "umt5": UMT5Spec}
        known = {k: v for k, v in document.items() if k != "repo_id"}  # older files have this key, and nothing reads it
        facts = {k: parts[k](**_tuples(v)) if k in parts else v for k, v in known.items()}
        return cls(**facts)


def _tuples(facts: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}


A14B = ModelSpec()
