"""Defines the options that say which models run, and with which kernels, precision and quantization."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from wanfast.runtime.config.option import (
    ALL,
    COMPILED,
    EXACT,
    FILES,
    LOSSY,
    MAKE,
    MEASURE,
    Option,
    Part,
    flag,
    options_of,
)
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import (
    NAMED_MODELS,
    Attention,
    Command,
    CompileMode,
    Device,
    Precision,
    RecipeName,
    Scheme,
    in_8_bits,
)

_STRENGTH = re.compile(r"(.+)@([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_MOST_STRENGTH = 100
_LORA: tuple[Command, ...] = ("calibrate-magcache", "serve", "doctor")  # warmup compiles alike with and without LoRAs


def parse_lora(text: str) -> tuple[str, float]:
    """Splits a value of --lora into (path, strength).

    The strength is the number after the last @. If no number follows the last @, the whole value is the path, and the
    strength is 1.
    """
    match = _STRENGTH.fullmatch(text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def _lora_fix(text: str) -> str | None:
    path, strength = parse_lora(text)
    if not path.strip():
        return "is empty: name a .safetensors file"
    if abs(strength) > _MOST_STRENGTH:
        return f"use a strength from -{_MOST_STRENGTH} to {_MOST_STRENGTH}; 1 is the file's own"
    return None


def _lora_option(help_text: str) -> Option:
    return Option(help_text, MAKE, also=_LORA, metavar="<file[@x]>", path=True, check=_lora_fix)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Part):
    """This part of a config says which models run, and with which kernels, precision and quantization.

    If two jobs have equal values in this part, they share the loaded models.
    """

    model: Annotated[
        str,
        Option(
            "tiny (ships with the package), a14b (the published weights), or a folder in the original or the Diffusers "
            "layout.",
            MAKE,
            also=ALL,
            path=True,
            names=NAMED_MODELS,
        ),
    ] = "a14b"
    recipe: Annotated[
        RecipeName | None,
        Option(
            "Named set of options. An option that you give yourself overrides the recipe's value. wanfast's recipes: "
            f"exact, near-exact, fast. Published recipes: {', '.join(get_args(RecipeName)[:-3])}.",
            MAKE,
            also=("calibrate-magcache", "serve", "warmup"),
            metavar="<name>",
        ),
    ] = field(default=None, compare=False)  # other options of it say which models run
    lora: Annotated[
        tuple[str, ...],
        _lora_option(
            "LoRA that is merged into the weights of both experts. FILE@X gives the strength X; without @X it is 1. "
            "The option may be given several times."
        ),
    ] = ()
    lora_high_noise: Annotated[tuple[str, ...], _lora_option("LoRA of the high-noise expert only.")] = ()
    lora_low_noise: Annotated[tuple[str, ...], _lora_option("LoRA of the low-noise expert only.")] = ()
    lora_sha256: tuple[str, ...] = ()  # of the files, in the order of the three options
    attention: Annotated[
        Attention,
        Option(
            "Attention kernel: FlashAttention 3, 4 or 2, or one of torch's. auto uses the fastest that gives correct "
            "results on this machine.",
            EXACT,
            also=COMPILED,
        ),
    ] = "auto"
    compile: Annotated[
        bool,
        Option("Compile the experts' blocks. The first run takes about ten seconds more.", EXACT, also=MEASURE),
    ] = False
    compile_mode: Annotated[
        CompileMode,
        Option(
            "torch.compile mode: the max-autotune modes time more kernels; max-autotune also captures CUDA graphs.",
            EXACT,
            also=COMPILED,
        ),
    ] = "default"
    precision: Annotated[
        Precision, Option("Precision of the matrix products. Norms, sums and small layers stay fp32.", LOSSY, also=ALL)
    ] = "bf16"
    vae_precision: Annotated[
        Precision | None,
        Option(
            "Precision of the VAE's decoder. The encoder is always in fp32.",
            LOSSY,
            also=("bench", "serve", "doctor"),
            default="bf16, or fp32 with --precision fp32",
        ),
    ] = None
    tf32: Annotated[
        bool | None,
        Option(
            "Allow TF32 in float32 matrix products and convolutions.",
            LOSSY,
            also=COMPILED,
            default="only in the VAE's convolutions",
        ),
    ] = None
    quantize: Annotated[
        Scheme | None,
        Option(
            "Use experts that `wanfast quantize` stored with this scheme. With bf16 they are cast, not quantized.",
            LOSSY,
            also=ALL,
        ),
    ] = None
    quantize_on_the_fly: Annotated[
        bool,
        Option(
            "Quantize the weights while loading them, instead of using experts that were quantized before.",
            LOSSY,
            also=MEASURE,
        ),
    ] = False
    verify: Annotated[
        bool,
        Option(
            "Verify the hashes of stored quantized experts before loading, about a second for each GB.",
            FILES,
            also=MEASURE,
            of_this_run=True,
        ),
    ] = field(default=False, compare=False)  # the same models, verified or not
    artifacts_dir: Annotated[
        str,
        Option(
            "Folder for all artifacts: weights, text embeddings, quantized experts, curves, caches and runs.",
            FILES,
            also=ALL,
            of_this_run=True,
            envvar="WANFAST_ARTIFACTS",
            path=True,
        ),
    ] = "artifacts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae_precision is None:
            object.__setattr__(self, "vae_precision", self.precision)
        object.__setattr__(self, "lora_sha256", tuple(self.lora_sha256))  # JSON has a list
        check_places(self.model, self.artifacts_dir)
        if self.compile_mode != "default" and not self.compile:
            raise ConfigError(
                f"--compile-mode {self.compile_mode} needs --compile: add --compile, or drop --compile-mode"
            )
        if self.quantize_on_the_fly and not in_8_bits(self.quantize):
            raise ConfigError(
                "--quantize-on-the-fly needs --quantize with an 8-bit scheme: add --quantize int8-weight-only, for "
                "example, or drop --quantize-on-the-fly"
            )
        if self.verify and self.quantize is None:
            raise ConfigError("--verify reads what `wanfast quantize` stored: add --quantize SCHEME, or drop --verify")
        if self.verify and self.quantize_on_the_fly:
            raise ConfigError(
                "--verify and --quantize-on-the-fly exclude each other, because then no stored expert is read: drop "
                "one of the two"
            )
        if self.quantize and self.precision != "bf16":
            raise ConfigError(
                f"--quantize {self.quantize} needs --precision bf16: add --precision bf16, or drop --quantize"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """This class holds the options of `wanfast quantize`."""

    scheme: Scheme
    model: str = "a14b"
    expert: Literal["both", "high", "low"] = "both"
    lora: tuple[str, ...] = ()
    lora_high_noise: tuple[str, ...] = ()
    lora_low_noise: tuple[str, ...] = ()
    device: Device | None = None
    artifacts_dir: str = "artifacts"

    def __post_init__(self) -> None:
        for name in ("model", "lora", "lora_high_noise", "lora_low_noise", "artifacts_dir"):
            object.__setattr__(self, name, options_of(ModelsConfig)[name].complete(getattr(self, name)))
        check_places(self.model, self.artifacts_dir)
        left_out = {"high": "lora_low_noise", "low": "lora_high_noise"}.get(self.expert)
        if left_out and getattr(self, left_out):
            raise ConfigError(f"--expert {self.expert} leaves out the expert of {flag(left_out)}: drop one of the two")


def without_loras(models: ModelsConfig) -> ModelsConfig:
    return dataclasses.replace(models, lora=(), lora_high_noise=(), lora_low_noise=(), lora_sha256=())


def default_artifacts_dir() -> str:
    """Returns the default of --artifacts-dir: the folder in WANFAST_ARTIFACTS, or ./artifacts, as absolute path."""
    option = options_of(ModelsConfig)["artifacts_dir"]
    return str(option.complete(os.environ.get(option.option.envvar or "") or option.default))


def is_artifacts_dir_named(given: Mapping[str, Any]) -> bool:
    """Returns whether the user named the folder of artifacts, by --artifacts-dir or by WANFAST_ARTIFACTS."""
    variable = options_of(ModelsConfig)["artifacts_dir"].option.envvar or ""
    return "artifacts_dir" in given or bool(os.environ.get(variable))


def check_places(model: str, artifacts_dir: str) -> None:
    """Raises ConfigError if `model` or `artifacts_dir` is empty, because a path would then mean the current folder."""
    if not model.strip():
        raise ConfigError("--model is empty: use tiny, a14b or a folder of weights")
    if not artifacts_dir.strip():
        raise ConfigError("--artifacts-dir is empty: name a folder, or drop --artifacts-dir")
