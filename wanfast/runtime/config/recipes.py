"""Defines the recipes: named sets of options. An option that the user gives overrides the recipe's value.

There are three groups:

* `OURS`: `exact`, `near-exact` and `fast`. wanfast chooses the mesh.
* `FEW_STEPS`, for example `lightning-4`. These recipes need distilled weights. Such weights are distilled for certain
  noise levels, so each of these recipes has its own list of noise levels.
* `PUBLISHED`, for example `baseline`. These recipes repeat a published benchmark, which ran the reference program on 8
  GPUs. Each rank computes both branches of guidance, and the ranks share the tokens. The models are sharded, except in
  the recipes with quantized experts. MagCache skips forwards in each branch separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from wanfast.runtime.config.models import OF_LOSSY, ModelsConfig
from wanfast.runtime.config.option import LOSSY, Options, options_of
from wanfast.runtime.config.skipping import SkippingConfig, default_rule, spelled_out
from wanfast.runtime.config.video import VideoConfig
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import (
    EXPERTS,
    LOSSY_ATTENTION,
    Attention,
    Expert,
    FewStepRecipe,
    MagCacheRule,
    OwnRecipe,
    PublishedRecipe,
    RecipeName,
    Solver,
)


@dataclass(frozen=True)
class Recipe:
    """This class holds the options of a recipe."""

    options: Options
    of_several_ranks: Options = field(default_factory=dict)  # they need more than one rank, and are left out for one
    distilled: tuple[Expert, ...] = ()  # experts whose weights must be distilled to few steps
    num_images: int = 0  # that its noise levels or weights are for; 0: any number

    def given(self, options: Options) -> dict[str, Any]:
        """Returns the options that this recipe sets in a run.

        `options`: the other options of the run. If `num_gpus` and `nnodes` in `options` give only one rank, the result
        leaves out the options in `of_several_ranks`.
        """
        ranks = (options.get("num_gpus") or 1, options.get("nnodes") or 1)
        return {**self.options, **({} if ranks == (1, 1) else self.of_several_ranks)}


_OF_SKIPPING = list(options_of(SkippingConfig))  # the first is --magcache, which the others need


def _published(*parts: Options, sharded: bool = True) -> Recipe:
    sharding = {"dit_fsdp": "on", "t5_fsdp": "on"} if sharded else {}
    return Recipe({name: value for part in parts for name, value in part.items()}, {"cfg_parallel": 1, **sharding})


def _skips(name: str) -> Options:
    return {"magcache": name, "magcache_joint": "off"}


def _few_steps(
    sigmas: str,
    solver: Solver,
    distilled: tuple[Expert, ...] = EXPERTS,
    *,
    num_images: int = 0,
    **others: Any,
) -> Recipe:
    unguided = {f"guidance_{expert}": 1.0 for expert in distilled}
    options = {"sigmas": sigmas, "solver": solver, **unguided, **others}
    return Recipe(options, distilled=distilled, num_images=num_images)


# The first 15 of 40 steps at shift 5, with which the model was published; they are the high-noise expert's.
_BASE_15 = (
    "0.999799842,0.99469476,0.989377009,0.98383302,0.97804804,"
    "0.972006007,0.965689399,0.959079064,0.952154025,0.944891262,"
    "0.937265452,0.929248675,0.920810074,0.911915455,0.902526828"
)

_FA3: Options = {"attention": "fa3"}
_TF32: Options = {"tf32": True}
_COMPILE: Options = {"compile": True}
_INT8: Options = {"quantize": "int8-weight-only"}
# Of near-exact and fast, which share loaded models. Lossy attention stands here only because its gate holds, as the
# table in docs/sparse-attention.md says.
_NEAR_EXACT: Options = {"quantize": "fp8-rowwise", "attention": "fa3-fp8"}

RECIPES: Mapping[RecipeName, Recipe] = MappingProxyType(
    {
        # torch's own FlashAttention-2, because the package of FlashAttention-2 has no wheel
        "baseline": _published({"attention": "flash"}),
        "fa3": _published(_FA3),
        "fa3-tf32": _published(_FA3, _TF32),
        "int8": _published(_FA3, _INT8, sharded=False),
        "magcache": _published(_FA3, _skips("E012K2R20")),
        "magcache-tf32": _published(_FA3, _TF32, _skips("E012K2R20")),
        "compile": _published(_FA3, _COMPILE),
        "compile-int8": _published(_FA3, _COMPILE, _INT8, sharded=False),
        "compile-tf32": _published(_FA3, _COMPILE, _TF32),
        "fastest-original": _published(_FA3, _TF32, _COMPILE, _skips("E012K2R20")),
        "fastest-original-k2r10": _published(_FA3, _TF32, _COMPILE, _skips("E012K2R10")),
        "fastest-original-e024k2r10": _published(_FA3, _TF32, _COMPILE, _skips("E024K2R10")),
        "exact": Recipe({"vae_precision": "fp32"}),
        "near-exact": Recipe(_NEAR_EXACT),
        "fast": Recipe({**_NEAR_EXACT, "magcache": "E012K2R20", "magcache_rule": "both-experts"}),
        "lightning-4": _few_steps("1,0.9375,0.833333333,0.625", "euler"),
        "lightning-8": _few_steps("1,0.972222222,0.9375,0.892857143,0.833333333,0.75,0.625,0.416666667", "euler"),
        "hybrid": _few_steps(f"{_BASE_15},0.75,0.5,0.25", "unipc-euler", ("low_noise",), num_images=1, switch_step=15),
        "rcm-4": _few_steps("0.99502,0.93378,0.8529,0.60898", "rcm"),
        "first-last-4": _few_steps(  # shift 16
            "1,0.979591837,0.941176471,0.842105263", "euler", num_images=2, switch_step=2
        ),
    }
)

OURS: tuple[RecipeName, ...] = get_args(OwnRecipe)
FEW_STEPS: tuple[RecipeName, ...] = get_args(FewStepRecipe)
PUBLISHED: tuple[RecipeName, ...] = get_args(PublishedRecipe)
GROUPS: Mapping[str, tuple[RecipeName, ...]] = MappingProxyType(
    {"ours": OURS, "published": PUBLISHED, "few-steps": FEW_STEPS}
)
OF_GRID = ("steps", "shift")  # options that a list of noise levels excludes

# The options that save time or memory at the price of an error, with their defaults.
LOSSY_OPTIONS: Options = {
    name: option.default
    for name, option in {**options_of(ModelsConfig), **options_of(SkippingConfig)}.items()
    if option.option.panel == LOSSY
} | {"guidance_gate": VideoConfig.guidance_gate}
_OF_SAME_VIDEO = {"quantize_on_the_fly", "attention_check"}  # of these, those that change nothing that a video shows


def with_recipe(given: Options) -> dict[str, Any]:
    """Returns the `given` options; if --recipe is given, the options of that recipe are added.

    A given option overrides the same option of the recipe. If --magcache off is given, no MagCache option of the recipe
    is added. If --attention is given and differs from the recipe's, the recipe's lossy attention and its options, such
    as --density, are not added. Raises ConfigError if --steps or --shift is given, but the recipe has its own list of
    noise levels.
    """
    name = given.get("recipe")
    if name is None:
        return dict(given)
    of_recipe = RECIPES[name].given(given)
    fixed = next((option for option in OF_GRID if given.get(option) is not None), None)
    if fixed and "sigmas" in of_recipe and given.get("sigmas") is None:
        raise ConfigError(
            f"--recipe {name} and --{fixed} exclude each other, because the recipe has its own noise levels: drop one "
            f"of the two, or give --sigmas instead of --{fixed}"
        )
    if given.get("sigmas") is not None:
        of_recipe.pop("switch_step", None)  # an index into the recipe's own list
    if given.get("magcache") == "off":
        of_recipe = {option: value for option, value in of_recipe.items() if option not in _OF_SKIPPING}
    if given.get("attention") not in (None, of_recipe.get("attention")):
        of_recipe = without_lossy_attention(of_recipe)
    return {**given, **of_recipe, **{option: value for option, value in given.items() if value is not None}}


def without_lossy_attention(options: Options) -> dict[str, Any]:
    """Returns `options` without a lossy --attention, and without the options that need one, such as --density."""
    gone = {*OF_LOSSY, "attention"} if options.get("attention") in LOSSY_ATTENTION else set(OF_LOSSY)
    return {option: value for option, value in options.items() if option not in gone}


def has_lossy_attention(name: RecipeName | None, kernel: Attention) -> bool:
    """Returns whether the recipe `name` sets --attention to `kernel`, and `kernel` is lossy."""
    return name is not None and kernel in LOSSY_ATTENTION and RECIPES[name].options.get("attention") == kernel


def has_levels(name: object) -> bool:
    """Returns whether `name` is a recipe with noise levels of its own."""
    return isinstance(name, str) and any(name == each and "sigmas" in RECIPES[each].options for each in RECIPES)


def overridden(effective: Options, own_rule: MagCacheRule) -> dict[str, Any]:
    """Returns {option: effective value} for each option by which a run differs from its recipe.

    `effective`: the effective options of the run. If they name no recipe, the result is empty. `own_rule`: the model's
    own default of --magcache-rule.
    An option that the recipe sets is compared with the recipe's value. An option of `LOSSY_OPTIONS` that the recipe
    does not set is compared with the option's default. Other options are not compared.
    """
    if (name := effective.get("recipe")) is None:
        return {}
    recipe = RECIPES[name].given(effective)
    effective = {**effective, **spelled_out(effective["magcache"])}
    of_recipe = recipe | spelled_out(recipe.get("magcache", "off"))
    wanted = of_recipe | _lossy_defaults(effective, own_rule) | of_recipe  # in this order
    if effective["sigmas"] != recipe.get("sigmas"):
        wanted.pop("switch_step", None)
    if effective["attention"] != recipe.get("attention"):
        wanted |= {option: LOSSY_OPTIONS[option] for option in OF_LOSSY}
    if effective["magcache"] == "off":
        wanted = {option: value for option, value in wanted.items() if option not in _OF_SKIPPING[1:]}
    found = {option: effective[option] for option, value in wanted.items() if effective[option] not in (None, value)}
    return {option: value for option, value in found.items() if option not in _OF_SAME_VIDEO}


def _lossy_defaults(effective: Options, own_rule: MagCacheRule) -> dict[str, Any]:
    """Returns the values of lossy options that are not given, in a run with `effective` values of the others."""
    derived = {"vae_precision": effective["precision"], "magcache_rule": default_rule(effective, own_rule)}
    attention = "auto" if effective["attention"] in LOSSY_ATTENTION else effective["attention"]
    return {"attention": attention, **LOSSY_OPTIONS, **derived}
