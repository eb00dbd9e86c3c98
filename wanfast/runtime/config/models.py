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
    OF_MEASUREMENT,
    WITH_KERNEL,
    Option,
    Part,
    at_least,
    between,
    flag,
    options_of,
)
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import (
    LOSSY_ATTENTION,
    NAMED_MODELS,
    Attention,
    Command,
    CompileMode,
    Device,
    FewStepRecipe,
    OwnRecipe,
    Precision,
    PublishedRecipe,
    RecipeName,
    Scheme,
    in_8_bits,
)
from wanfast.runtime.facts.fp8_schedule import parse_span

_STRENGTH = re.compile(r"(.+)@([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_MOST_STRENGTH = 100
_KEY = re.compile(r"[0-9a-f]{12}")  # of an artifact
_VALUES: tuple[Command, ...] = (
    "calibrate-magcache",
    "calibrate-attention",
    "serve",
    "doctor",
)  # warmup compiles alike for all values of weights


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
        return "has an empty value: give a .safetensors file"
    if abs(strength) > _MOST_STRENGTH:
        return f"use a strength from -{_MOST_STRENGTH} to {_MOST_STRENGTH}; 1 adds the LoRA unscaled"
    return None


def _lora_option(help_text: str, follows: tuple[str, ...] = ()) -> Option:
    return Option(help_text, MAKE, also=_VALUES, metavar="<file[@x]>", path=True, check=_lora_fix, follows=follows)


def _expert_option(help_text: str) -> Option:
    return Option(help_text, MAKE, also=_VALUES, metavar="<path>", asked=str, path=True, check=_expert_fix)


def _plan_fix(value: str) -> str | None:
    return None if value == "artifact" or _KEY.fullmatch(value) else "use artifact, or the key of a stored plan"


def _span_fix(text: str) -> str | None:
    return None if parse_span(text) else "use two numbers, the first one smaller, such as 4:36"


def _expert_fix(path: str) -> str | None:
    return None if path.strip() else "has an empty value: give a .safetensors or .gguf file, or a folder"


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Part):
    """This part of a config says which models run, and with which kernels, precision and quantization.

    If two jobs have equal values in this part, they share the loaded models.
    """

    model: Annotated[
        str,
        Option(
            "tiny (ships with the package), a14b (the published weights), t2v-a14b (the published weights that take no "
            "image), or a folder in the original or the Diffusers layout.",
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
            f"{', '.join(get_args(OwnRecipe))}. For distilled weights: {', '.join(get_args(FewStepRecipe))}. Published "
            f"recipes: {', '.join(get_args(PublishedRecipe))}.",
            MAKE,
            also=("calibrate-magcache", "calibrate-attention", "serve", "warmup"),
            metavar="<name>",
        ),
    ] = field(default=None, compare=False)  # other options of it say which models run
    high_noise_expert: Annotated[
        str | None,
        _expert_option(
            "File or folder that replaces the model's high-noise expert: .safetensors or .gguf. The weights may be "
            "scaled to fp8 or int8."
        ),
    ] = None
    low_noise_expert: Annotated[
        str | None, _expert_option("File or folder that replaces the model's low-noise expert.")
    ] = None
    expert_sha256: tuple[str, ...] = ()  # of the files of the two options, the high-noise expert first
    lora: Annotated[
        tuple[str, ...],
        _lora_option(
            "LoRA that is merged into the weights of both experts. FILE@X gives the strength X; without @X, the "
            "strength is 1. "
            "The option may be given several times."
        ),
    ] = ()
    lora_high_noise: Annotated[
        tuple[str, ...],
        _lora_option("LoRA of the high-noise expert only.", follows=("model", "recipe", "lora", "high_noise_expert")),
    ] = ()
    lora_low_noise: Annotated[
        tuple[str, ...],
        _lora_option("LoRA of the low-noise expert only.", follows=("model", "recipe", "lora", "low_noise_expert")),
    ] = ()
    lora_sha256: tuple[str, ...] = ()  # of the files, in the order of the three options
    attention: Annotated[
        Attention,
        Option(
            "Attention kernel: FlashAttention 3, 4 or 2, or a kernel of torch. auto uses the fastest kernel that gives "
            "correct results on this machine. sparse (with --density or --attention-plan) and fa3-fp8 are lossy.",
            EXACT,
            also=(*WITH_KERNEL, "warmup"),
            follows=("model", "recipe", "precision", "device"),
        ),
    ] = "auto"
    compile: Annotated[
        bool,
        Option("Compile the experts' blocks. The first run takes about ten seconds more.", EXACT, also=WITH_KERNEL),
    ] = False
    compile_mode: Annotated[
        CompileMode,
        Option(
            "torch.compile mode. Both max-autotune modes try more kernels; max-autotune also captures CUDA graphs.",
            EXACT,
            also=(*WITH_KERNEL, "warmup"),
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
            follows=("precision",),
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
            "Use experts that `wanfast quantize` stored with this scheme. The scheme bf16 stores a copy in bf16.",
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
    density: Annotated[
        float | None,
        Option(
            "With --attention sparse, compute this share of the blocks. The share includes the blocks that are always "
            "computed.",
            LOSSY,
            also=("serve", "warmup"),
            check=lambda x: None if 0 < x <= 1 else "use a share over 0, up to 1, such as 0.35",
        ),
    ] = field(
        default=None, compare=False
    )  # the weights serve any density; so it is with all options of lossy attention
    attention_plan: Annotated[
        str | None,
        Option(
            "Plan that gives --attention sparse a density for each head, layer and band of steps. artifact uses the "
            "plan that `wanfast calibrate-attention` made for these options. KEY uses the stored plan with this key.",
            LOSSY,
            also=("serve", "warmup"),
            metavar="<artifact|KEY>",
            check=_plan_fix,
            follows=(*OF_MEASUREMENT, "lists_every"),
        ),
    ] = field(default=None, compare=False)
    dense_share: Annotated[
        float,
        Option(
            "With --attention sparse, share of the steps that use dense attention, counted from the first step.",
            LOSSY,
            also=("serve",),
            check=lambda x: None if 0 <= x < 1 else "use a share, 0 or more and under 1",
        ),
    ] = field(default=0.25, compare=False)
    dense_layers: Annotated[
        int,
        Option(
            "With --attention sparse, number of layers that use dense attention, counted from the first layer.",
            LOSSY,
            also=("serve",),
            check=at_least(0, "use a number of layers, 0 or more"),
        ),
    ] = field(default=1, compare=False)
    lists_every: Annotated[
        int,
        Option(
            "With --attention sparse, choose the blocks again after this number of steps.",
            LOSSY,
            also=("serve", "calibrate-attention"),
            check=between(1, 1000, "use 1 to 1000 steps"),
        ),
    ] = field(default=4, compare=False)
    fp8_steps: Annotated[
        str | None,
        Option(
            "Steps in which --attention fa3-fp8 computes in float8, counted from 0. 4:36 means the steps 4 to 35.",
            LOSSY,
            also=("serve",),
            metavar="<a:b>",
            default="all except the first and the last eighth",
            check=_span_fix,
        ),
    ] = field(default=None, compare=False)
    fp8_layers: Annotated[
        str | None,
        Option(
            "Layers in which --attention fa3-fp8 computes in float8, counted from 0.",
            LOSSY,
            also=("serve",),
            metavar="<a:b>",
            default="all",
            check=_span_fix,
        ),
    ] = field(default=None, compare=False)
    fp8_hadamard: Annotated[
        bool | None,
        Option(
            "With --attention fa3-fp8, multiply queries and keys by a Hadamard matrix before they are rounded.",
            LOSSY,
            also=("serve", "warmup"),
            default="on if a head has 2^n channels",
        ),
    ] = field(default=None, compare=False)
    attention_check: Annotated[
        bool,
        Option(
            "With lossy attention, measure the error of each head in each call, on a sample of 64 queries. The .json "
            "records the errors.",
            LOSSY,
            also=("serve", "warmup"),
        ),
    ] = field(default=False, compare=False)
    verify: Annotated[
        bool,
        Option(
            "Verify the hashes of stored quantized experts before loading. This takes about a second for each GB.",
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
        for name in ("expert_sha256", "lora_sha256"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has a list
        check_places(self.model, self.artifacts_dir)
        self._check_lossy_attention()
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
                "--verify and --quantize-on-the-fly exclude each other, because --quantize-on-the-fly reads no stored "
                "expert: drop one of the two"
            )
        if self.quantize and self.precision != "bf16":
            raise ConfigError(
                f"--quantize {self.quantize} needs --precision bf16: add --precision bf16, or drop --quantize"
            )

    def _check_lossy_attention(self) -> None:
        given = [name for name in OF_LOSSY if getattr(self, name) != options_of(ModelsConfig)[name].default]
        for name in given:
            if self.attention not in OF_LOSSY[name]:
                kernels = " or ".join(OF_LOSSY[name])
                fix = f"use --attention {OF_LOSSY[name][0]}, or drop {flag(name)}"
                raise ConfigError(f"{flag(name)} needs --attention {kernels}: {fix}")
        if self.attention == "sparse" and self.density is None and self.attention_plan is None:
            raise ConfigError("--attention sparse needs --density or --attention-plan: add --density 0.35, for example")
        if self.density is not None and self.attention_plan is not None:
            raise ConfigError("--density and --attention-plan exclude each other: drop one of the two")
        if self.attention in LOSSY_ATTENTION and self.compile_mode == "max-autotune":
            raise ConfigError(
                f"--attention {self.attention} and --compile-mode max-autotune exclude each other, because a captured "
                "graph repeats the attention of one step: use --compile-mode max-autotune-no-cudagraphs"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """This class holds the options of `wanfast quantize`."""

    scheme: Scheme
    model: str = "a14b"
    expert: Literal["both", "high", "low"] = "both"
    high_noise_expert: str | None = None
    low_noise_expert: str | None = None
    lora: tuple[str, ...] = ()
    lora_high_noise: tuple[str, ...] = ()
    lora_low_noise: tuple[str, ...] = ()
    device: Device | None = None
    artifacts_dir: str = "artifacts"

    def __post_init__(self) -> None:
        for name in (*OF_WEIGHTS, "artifacts_dir"):
            object.__setattr__(self, name, options_of(ModelsConfig)[name].complete(getattr(self, name)))
        check_places(self.model, self.artifacts_dir)
        left_out = {"high": "low_noise", "low": "high_noise"}.get(self.expert)
        for name in (f"lora_{left_out}", f"{left_out}_expert") if left_out else ():
            if getattr(self, name):
                raise ConfigError(
                    f"--expert {self.expert} and {flag(name)} are for different experts: drop one of the two"
                )


# The options that say which weights are quantized.
OF_WEIGHTS = ("model", "high_noise_expert", "low_noise_expert", "lora", "lora_high_noise", "lora_low_noise")


# The options that only lossy attention has, and the kernels that have them.
OF_LOSSY: dict[str, tuple[Attention, ...]] = {
    **dict.fromkeys(("density", "attention_plan", "dense_share", "dense_layers", "lists_every"), ("sparse",)),
    **dict.fromkeys(("fp8_steps", "fp8_layers", "fp8_hadamard"), ("fa3-fp8",)),
    "attention_check": LOSSY_ATTENTION,
}


def without_loras(models: ModelsConfig) -> ModelsConfig:
    return dataclasses.replace(models, lora=(), lora_high_noise=(), lora_low_noise=(), lora_sha256=())


def default_artifacts_dir() -> str:
    """Returns the default of --artifacts-dir as an absolute path: the value of WANFAST_ARTIFACTS, else ./artifacts."""
    option = options_of(ModelsConfig)["artifacts_dir"]
    return str(option.complete(os.environ.get(option.option.envvar or "") or option.default))


def is_artifacts_dir_named(given: Mapping[str, Any]) -> bool:
    """Returns whether the user named the folder of artifacts, by --artifacts-dir or by WANFAST_ARTIFACTS."""
    variable = options_of(ModelsConfig)["artifacts_dir"].option.envvar or ""
    return "artifacts_dir" in given or bool(os.environ.get(variable))


def check_places(model: str, artifacts_dir: str) -> None:
    """Raises ConfigError if `model` or `artifacts_dir` is empty, because an empty path means the current folder."""
    if not model.strip():
        raise ConfigError(f"--model has an empty value: use {', '.join(NAMED_MODELS)} or a folder of weights")
    if not artifacts_dir.strip():
        raise ConfigError("--artifacts-dir has an empty value: give a folder, or drop --artifacts-dir")
