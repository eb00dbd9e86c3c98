"""Tests what a run repeats of an earlier run: what was given stays, and what was derived is derived again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Machine, Outcome
from wanfast.runtime.config import NO_VIDEO, OPTIONS, EffectiveConfig
from wanfast.runtime.config.precedence import repeated, without_overridden
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.config.skipping import spelled_out
from wanfast.runtime.facts.choices import RecipeName
from wanfast.runtime.facts.model_spec import A14B

Wanfast = Callable[..., Outcome]
STAR = {"image": "cat.png", "prompt": "a cat", "seed": 1, "device": "cuda"}
# What a run decides by itself, on one GPU and on eight.
DECIDED = {"dit_fsdp": "off", "t5_fsdp": "off", "expert_offload": "off"}
MESHES: dict[int, dict[str, Any]] = {1: {"cfg_parallel": 1, "ulysses": 1}, 8: {"cfg_parallel": 2, "ulysses": 4}}


def recorded(given: dict[str, Any], num_gpus: int = 1) -> dict[str, Any]:
    """Returns the value of each option as the .json of a run records them."""
    asked = EffectiveConfig.of({**NO_VIDEO, **STAR, "num_gpus": num_gpus, **given}, A14B).options()
    ran = {**asked, **spelled_out(asked["magcache"])}
    of_ranks = MESHES[num_gpus] | DECIDED
    ran |= {name: value for name, value in of_ranks.items() if ran[name] in (None, "auto")}
    ran["magcache_rule"] = ran["magcache_rule"] or (None if ran["magcache"] == "off" else "low-noise-only")
    return ran | ({"attention": "fa3"} if ran["attention"] == "auto" else {})


def again(given: dict[str, Any], typed: dict[str, Any], num_gpus: int = 1) -> dict[str, Any]:
    """Returns the options of a run that repeats the run with the `given` options, and has the `typed` options."""
    asked = {**STAR, "num_gpus": num_gpus, **given, **spelled_out(given.get("magcache", "off"))}
    options, _ = repeated(recorded(given, num_gpus), asked, typed)
    return EffectiveConfig.of({**options, **typed}, A14B).options()


def plain(given: dict[str, Any], typed: dict[str, Any], num_gpus: int = 1) -> dict[str, Any]:
    """Returns the options of a run that has all of these options from the start."""
    asked = {**STAR, "num_gpus": num_gpus, **given}
    return EffectiveConfig.of({**NO_VIDEO, **without_overridden(asked, typed), **typed}, A14B).options()


@pytest.mark.parametrize("num_gpus", MESHES)
def test_a_recipe_replaces_the_one_of_an_earlier_run(num_gpus: int) -> None:
    for earlier, later in itertools.product(RECIPES, RECIPES):
        found, wanted = (how({"recipe": earlier}, {"recipe": later}, num_gpus) for how in (again, plain))
        assert found == wanted, (earlier, later)


@pytest.mark.parametrize(
    "lossy",
    [
        {"quantize": "int8-dynamic", "quantize_on_the_fly": True},
        {"magcache": "preset", "magcache_budget": 0.5, "magcache_extrapolate": True},
        {"attention": "sparse", "density": 0.4, "dense_layers": 2},
        {"tf32": True, "guidance_gate": 0.5},
    ],
)
@pytest.mark.parametrize("earlier", [None, "near-exact", "magcache-tf32"])
def test_a_recipe_replaces_the_lossy_options_of_an_earlier_run(
    earlier: RecipeName | None, lossy: dict[str, Any]
) -> None:
    given = {"recipe": earlier, **lossy, "steps": 30, "compile": True}
    options = again(given, {"recipe": "exact"})
    assert options == plain({}, {"recipe": "exact", "steps": 30, "compile": True})


def test_a_recipe_replaces_what_was_given_for_an_earlier_run() -> None:
    """Its own options for several ranks too, because the earlier run says how many ranks there are."""
    found = again({"cfg_parallel": 2, "attention": "math", "solver": "euler"}, {"recipe": "fa3"}, 8)
    assert {**RECIPES["fa3"].given({"num_gpus": 8}), "solver": "euler"}.items() <= found.items()


MESH = "cfg_parallel ulysses"
PLACED = "dit_fsdp t5_fsdp expert_offload"


@pytest.mark.parametrize(
    ("given", "typed", "num_gpus", "names"),
    [
        ({}, {"precision": "fp32"}, 1, f"vae_precision attention {PLACED}"),
        ({"quantize": "int8-dynamic"}, {"precision": "fp32"}, 1, f"quantize vae_precision attention {PLACED}"),
        ({"attention": "flash"}, {"precision": "fp32"}, 1, f"vae_precision {PLACED}"),
        ({}, {"device": "cpu"}, 1, f"attention {PLACED}"),
        ({}, {"cfg_parallel": 1}, 8, f"ulysses {PLACED}"),
        ({}, {"guidance_high_noise": 1.0, "guidance_low_noise": 1.0}, 8, f"{MESH} {PLACED}"),
        ({}, {"size": "1920x1088", "frames": 121}, 8, PLACED),
        ({"expert_offload": "on"}, {"frames": 121}, 1, "dit_fsdp t5_fsdp"),
        ({"magcache": "E024K3R20"}, {"sigmas": "1,0.5"}, 1, f"steps shift magcache_rule {MESH} {PLACED}"),
    ],
)
def test_a_derived_value_is_derived_again(
    given: dict[str, Any], typed: dict[str, Any], num_gpus: int, names: str
) -> None:
    ran, found, wanted = recorded(given, num_gpus), again(given, typed, num_gpus), plain(given, typed, num_gpus)
    changed = {*names.split(), *typed}
    assert {name: found[name] for name in changed} == {name: wanted[name] for name in changed}
    others = {name for name, value in ran.items() if found[name] != value} - changed
    assert not others
    assert {name for name in changed if ran[name] == wanted[name]} == set()


@pytest.mark.parametrize("typed", [{"precision": "fp32"}, {"steps": 20}, {"device": "cpu"}, {"cfg_parallel": 1}])
def test_a_given_value_is_not_derived_again(typed: dict[str, Any]) -> None:
    given = {
        "vae_precision": "bf16", "attention": "flash", "ulysses": 4, "expert_offload": "on", "magcache": "E024K3R20",
        "magcache_rule": "both-experts",
    }  # fmt: skip
    found = again(given, typed, 8)
    kept = {**given, **spelled_out("E024K3R20"), **typed}
    assert {name: found[name] for name in kept} == kept


@pytest.mark.parametrize(
    ("asked", "name"),
    [({"magcache": "artifact"}, "magcache"), ({"attention": "sparse", "attention_plan": "artifact"}, "attention_plan")],
)
def test_the_key_of_an_artifact_is_for_the_options_of_its_run(asked: dict[str, Any], name: str) -> None:
    given = {**STAR, **asked}
    ran = EffectiveConfig.of({**given, name: "0123456789ab"}, A14B).options()
    assert repeated(ran, given, {"seed": 3})[0][name] == "0123456789ab"
    assert repeated(ran, given, {"steps": 20})[0][name] == "artifact"


def test_another_model_has_its_own_defaults() -> None:
    """But what was given for the earlier model stays."""
    ran = recorded({"frames": 21})
    options, _ = repeated(ran, {**STAR, "frames": 21}, {"model": "tiny"})
    assert options["frames"] == 21
    own = {"size", "steps", "shift", "guidance_high_noise", "guidance_low_noise", "negative_prompt", "fps"}
    assert not own & options.keys()


def test_values_stay_if_nothing_that_they_follow_from_is_given() -> None:
    """Because a default may be another one in a later version, and a kernel or mesh another one on other machines."""
    given = {"recipe": "magcache", "num_gpus": 8}
    ran = recorded(given, 8)
    options, asked = repeated(ran, given, {"seed": 3, "prompt": "a dog"})
    assert options == {name: value for name, value in ran.items() if name not in ("seed", "prompt")}
    assert asked == given


def test_every_option_follows_from_options() -> None:
    assert {name for option in OPTIONS.values() for name in option.follows} <= OPTIONS.keys()


def test_the_exact_recipe_is_exact_after_a_fast_run(wanfast: Wanfast, machine: Machine, workdir: Path) -> None:
    machine(1, 200)

    def plan(*options: str) -> dict[str, Any]:
        outcome = wanfast("generate", *options, "--dry-run", "--json")
        assert outcome.exit_code == 0, outcome.err
        Path("last.json").write_text(json.dumps(outcome.document | {"weights": None}))
        return outcome.document

    star = ("--image", "cat.png", "--prompt", "a cat", "--seed", "1")
    wanted = plan(*star, "--recipe", "exact")
    assert plan(*star, "--recipe", "fast")["plan"]["magcache"]["skipped_forwards"]
    found = plan("--from", "last.json", "--recipe", "exact")
    assert found["effective"] == wanted["effective"]
    assert found["requested"] == wanted["requested"] | {"image": str(workdir / "cat.png")}
    precise = plan("--from", "last.json", "--precision", "fp32")  # of a run that repeats another one
    assert precise["effective"] == plan(*star, "--recipe", "exact", "--precision", "fp32")["effective"]


def test_a_vae_that_follows_the_precision_is_not_repeated(wanfast: Wanfast, workdir: Path) -> None:
    star = ("--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--device", "cpu")
    made = wanfast("generate", *star, "--dry-run", "--json").document
    (workdir / "out.json").write_text(json.dumps(made | {"weights": None}))
    for options, precision in (("--precision", "fp32"), "fp32"), (("--size", "64x64"), "bf16"):
        outcome = wanfast("generate", "--from", "out.json", *options, "--dry-run", "--json")
        assert outcome.document["effective"]["models"]["vae_precision"] == precision
