"""Decides which options of one source stay if a source of higher priority gives options too.

A source of options is a line of a list, the command line or an earlier run. A line overrides the command line, and the
command line overrides an earlier run. Some values of an earlier run were given, and others were derived from given
options. If a new value is given for an option, all values that were derived from this option are derived again.
This module does not import torch.
"""

from __future__ import annotations

from typing import Any

from wanfast.runtime.config.effective import OPTIONS
from wanfast.runtime.config.models import OF_LOSSY
from wanfast.runtime.config.option import Options, options_of
from wanfast.runtime.config.recipes import LOSSY_OPTIONS, OF_GRID, RECIPES, has_levels, with_recipe
from wanfast.runtime.config.skipping import SkippingConfig
from wanfast.runtime.facts.choices import LOSSY_ATTENTION

_FITTED = ("image", "last_image")  # what --fit is for
_DENSITIES = {"density", "attention_plan"}  # at most one of them may be given


def without_overridden(options: Options, nearer: Options) -> dict[str, Any]:
    """Returns `options` without the options that `nearer`, a source of higher priority, overrides.

    An option in `nearer` overrides the same option, and every option that contradicts it. For example, `sigmas`
    overrides `steps` and `shift`, `image` overrides `continue_from`, and `magcache` overrides all other options of
    MagCache. `continue_from` also overrides `size` and `fps`.
    """
    skipping = options_of(SkippingConfig)
    amounts = {name for name, field in skipping.items() if field.option.choice}
    gone = set(nearer.keys())
    if nearer.keys() & {*OF_GRID}:
        gone |= {"sigmas", "switch_step"}
    if "sigmas" in nearer or has_levels(nearer.get("recipe")):
        gone |= {*OF_GRID, "sigmas", "switch_step"}
    if nearer.keys() & {"image", "continue_from"}:
        gone |= {"image", "continue_from"}
    if "continue_from" in nearer:
        gone |= {"size", "fps"}
    if isinstance(prompts := nearer.get("prompt"), list | tuple) and len(prompts) > 1:
        gone.add("last_image")  # which is of a single clip
    if gone & {*_FITTED} and not any(nearer.get(name) or (options.get(name) and name not in gone) for name in _FITTED):
        gone.add("fit")
    if nearer.get("precision") == "fp32":
        gone |= {"quantize", "quantize_on_the_fly"}
    if "magcache" in nearer:
        gone |= skipping.keys() - {"magcache"}
    if "attention" in nearer:
        gone |= {name for name, kernels in OF_LOSSY.items() if nearer["attention"] not in kernels}
    if nearer.keys() & _DENSITIES:
        gone |= _DENSITIES
    if nearer.keys() & amounts:
        gone |= {*amounts, "magcache_rule"}  # the rule's default follows from the amount
    return {name: value for name, value in options.items() if name not in gone}


def repeated(ran: Options, asked: Options, typed: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of a new run that repeats an earlier run, but with the `typed` options.

    `ran`: all options of the earlier run. `asked`: those of them that the user gave; the others were derived. Returns
    two mappings from options to values:

    * what the new run takes from `ran`;
    * what the new run takes from `asked`.

    Both mappings leave out each overridden option. A typed option overrides the same option, and every option that
    contradicts it. A typed recipe also overrides all options of the earlier recipe, and all lossy options.
    If an option's default depends on a typed or overridden option, the first mapping holds the value that the user gave
    for the earlier run. If the user gave no value, the first mapping leaves the option out, and the new run derives its
    value again.
    """
    ranks = {name: ran[name] for name in ("num_gpus",) if name in ran}
    nearer = {
        name: value for name, value in with_recipe({**ranks, **typed}).items() if name not in ranks or name in typed
    }
    gone = ran.keys() - without_overridden(ran, nearer).keys()
    if "recipe" in typed:
        gone |= _of_recipe(ran)
    again = _derived_again(ran, gone | nearer.keys())
    options = {name: value for name, value in ran.items() if name not in gone | again}
    options |= {name: asked[name] for name in again & asked.keys()}
    return options, {name: value for name, value in asked.items() if name not in gone | nearer.keys()}


def _of_recipe(ran: Options) -> set[str]:
    """Returns the options that the earlier recipe can set, and all lossy ones."""
    recipe = None if ran.get("recipe") is None else RECIPES[ran["recipe"]]
    own = {*recipe.options, *recipe.of_several_ranks} if recipe else set()
    attention = {"attention"} if ran.get("attention") in LOSSY_ATTENTION else set()
    return own | attention | LOSSY_OPTIONS.keys()


def _derived_again(ran: Options, changed: set[str]) -> set[str]:
    """Returns the options whose values follow from the `changed` options, also by way of each other."""
    found: set[str] = set()
    while more := {name for name in ran.keys() - changed - found if OPTIONS[name].follows & (changed | found)}:
        found |= more
    return found
