"""Defines the values that options accept, the names of the experts, and the names of the branches of guidance."""

from __future__ import annotations

from typing import Literal, TypeGuard

Command = Literal[
    "generate", "calibrate-magcache", "calibrate-attention", "bench", "serve", "warmup", "doctor"
]  # they have the options of a config

Solver = Literal["unipc", "dpm++", "euler", "unipc-euler", "rcm"]
Precision = Literal["bf16", "fp32"]
Layout = Literal["original", "diffusers"]  # of files of weights
Device = Literal["cpu", "cuda"]
ImageFit = Literal["area", "crop", "pad"]  # how an image becomes a video of another shape
Expert = Literal["high_noise", "low_noise"]
EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")
Branch = Literal["prompt", "negative_prompt"]  # of guidance
NAMED_MODELS = ("tiny", "a14b", "t2v-a14b")  # any other model is a folder
BRANCHES: tuple[Branch, ...] = ("prompt", "negative_prompt")
MagCacheRule = Literal["low-noise-only", "both-experts"]
Switch = Literal["on", "off", "auto"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs", "max-autotune"]
Scheme = Literal["int8-weight-only", "int8-dynamic", "fp8-rowwise", "bf16"]
Attention = Literal["auto", "fa3", "fa4", "fa2", "cudnn", "flash", "efficient", "math", "sparse", "fa3-fp8"]
LOSSY_ATTENTION: tuple[Attention, ...] = ("sparse", "fa3-fp8")
OwnRecipe = Literal["exact", "near-exact", "fast"]
PublishedRecipe = Literal[
    "baseline", "fa3", "fa3-tf32", "int8", "magcache", "magcache-tf32", "compile", "compile-int8", "compile-tf32",
    "fastest-original", "fastest-original-k2r10", "fastest-original-e024k2r10",
]  # fmt: skip
FewStepRecipe = Literal["lightning-4", "lightning-8", "hybrid", "rcm-4", "first-last-4"]
RecipeName = Literal[OwnRecipe, FewStepRecipe, PublishedRecipe]  # in the order of the help


def in_8_bits(scheme: Scheme | None) -> TypeGuard[Scheme]:
    """Returns whether a scheme stores weights in 8 bits: False for `bf16` and None, True for all other schemes."""
    return scheme not in (None, "bf16")
