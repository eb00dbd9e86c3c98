"""Tests the recipes: which options each one sets, and that given options override them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.conftest import Machine, Outcome
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, effective, of_command, recipes
from wanfast.runtime.config.option import words
from wanfast.runtime.config.recipes import (
    FEW_STEPS,
    OURS,
    PUBLISHED,
    RECIPES,
    Recipe,
    has_lossy_attention,
    overridden,
    with_recipe,
)
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Attention, RecipeName
from wanfast.runtime.facts.model_spec import A14B

Wanfast = Callable[..., Outcome]
STAR = ("--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--device", "cpu")
SHARDED = {"cfg_parallel": 1, "dit_fsdp": "on", "t5_fsdp": "on"}
SKIPS = {"magcache": "E012K2R20", "magcache_joint": "off"}


def config_of(**given: Any) -> EffectiveConfig:
    return EffectiveConfig.of({**NO_VIDEO, **given}, A14B)


def changes(config: EffectiveConfig) -> dict[str, Any]:
    return overridden(config.options(), A14B.magcache_rule)


def test_the_names_are_the_recipes() -> None:
    assert sorted(RECIPES) == sorted(get_args(RecipeName))
    assert get_args(RecipeName) == (*OURS, *FEW_STEPS, *PUBLISHED)
    assert {*FEW_STEPS} == {name for name, recipe in RECIPES.items() if recipe.distilled}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("baseline", {"attention": "flash", **SHARDED}),
        ("fa3-tf32", {"attention": "fa3", "tf32": True, **SHARDED}),
        ("int8", {"attention": "fa3", "quantize": "int8-weight-only", "cfg_parallel": 1}),
        ("magcache", {"attention": "fa3", **SKIPS, **SHARDED}),
        ("fastest-original", {"attention": "fa3", "tf32": True, "compile": True, **SKIPS, **SHARDED}),
        ("exact", {"vae_precision": "fp32"}),
        ("near-exact", {"quantize": "fp8-rowwise", "attention": "fa3-fp8"}),
        ("fast", {**RECIPES["near-exact"].options, "magcache": "E012K2R20", "magcache_rule": "both-experts"}),
    ],
)
def test_a_recipe_is_its_options(name: RecipeName, options: dict[str, Any]) -> None:
    assert with_recipe({"recipe": name, "num_gpus": 8}) == {"recipe": name, "num_gpus": 8, **options}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("ranks", [1, 8])
def test_every_recipe_is_a_config(name: RecipeName, ranks: int) -> None:
    config = config_of(recipe=name, num_gpus=ranks)
    assert changes(config) == {}
    assert (config.ranks.dit_fsdp == "on") is (ranks == 8 and name in with_sharding())
    assert EffectiveConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def with_sharding() -> set[str]:
    return {name for name, recipe in RECIPES.items() if "dit_fsdp" in recipe.of_several_ranks}


def test_given_options_override_a_recipe() -> None:
    config = config_of(recipe="fa3-tf32", attention="math", tf32=None)
    assert (config.models.attention, config.models.tf32) == ("math", True)  # None is not given
    assert changes(config) == {"attention": "math"}
    unskipped = config_of(recipe="magcache", magcache="off")
    assert unskipped.skipping is None
    assert changes(unskipped) == {"magcache": "off"}
    again = EffectiveConfig.of(config.options(), A14B)  # as `--from` does
    assert again.models == config.models and again.models.recipe == "fa3-tf32"


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"quantize": "int8-dynamic"}, {"quantize": "int8-dynamic"}),
        (
            {"magcache": "E012K2R20"},
            {"magcache": "preset", "magcache_thresh": 0.12, "magcache_k": 2, "retention_ratio": 0.2},
        ),
        ({"magcache": "preset", "magcache_budget": 0.5}, {"magcache": "preset", "magcache_budget": 0.5}),
        ({"attention": "sparse", "density": 0.4}, {"attention": "sparse", "density": 0.4}),
        ({"attention": "fa3-fp8", "fp8_steps": "4:36"}, {"attention": "fa3-fp8", "fp8_steps": "4:36"}),
        ({"tf32": True, "guidance_gate": 0.5}, {"tf32": True, "guidance_gate": 0.5}),
        ({"precision": "fp32"}, {"precision": "fp32"}),
        ({"vae_precision": "bf16"}, {"vae_precision": "bf16"}),
        ({"attention": "math", "compile": True, "steps": 20}, {}),  # no more error than rounding
    ],
)
def test_lossy_options_outside_of_a_recipe_override_it(given: dict[str, Any], changed: dict[str, Any]) -> None:
    assert changes(config_of(recipe="exact", **given)) == changed


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"magcache_rule": "both-experts"}, {"magcache_rule": "both-experts"}),
        ({"magcache": "preset", "magcache_skip": 20}, {"magcache_skip": 20}),
        ({"precision": "fp32"}, {"precision": "fp32"}),  # the VAE follows
        ({"precision": "fp32", "vae_precision": "bf16"}, {"precision": "fp32", "vae_precision": "bf16"}),
    ],
)
def test_what_follows_from_a_recipe_does_not_override_it(
    wanfast: Wanfast, machine: Machine, given: dict[str, Any], changed: dict[str, Any]
) -> None:
    """In a plan, which holds values that no one gave: the threshold, the rule and the precision of the VAE."""
    machine(1, 500)
    options = [word for name, value in given.items() for word in words(name, value)]
    outcome = wanfast("generate", *STAR, "--device", "cuda", "--recipe", "magcache", *options, "--dry-run", "--json")
    assert outcome.document["plan"]["overridden"] == changed


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives `fast` sparse attention, which a recipe may have if the gate of tests/quality/test_gate.py holds."""
    fast = Recipe({"attention": "sparse", "density": 0.5, "lists_every": 2})
    for module in (recipes, effective):
        monkeypatch.setattr(module, "RECIPES", {**RECIPES, "fast": fast})


@pytest.mark.usefixtures("lossy")
def test_another_kernel_overrides_a_recipe_s_lossy_attention() -> None:
    """With its options, which the other kernel does not have and the user did not give."""
    assert config_of(recipe="near-exact").models.attention == "fa3-fp8"
    assert config_of(recipe="fast").models.density == 0.5 and not changes(config_of(recipe="fast"))
    exact = config_of(recipe="fast", attention="auto")
    assert (exact.models.attention, exact.models.density, exact.models.lists_every) == ("auto", None, 4)
    assert changes(exact) == {"attention": "auto"}
    assert config_of(recipe="near-exact", attention="math").models.quantize == "fp8-rowwise"
    assert config_of(recipe="fast", density=0.6).models.density == 0.6
    with pytest.raises(ConfigError, match="--density needs --attention sparse"):
        config_of(recipe="fast", attention="auto", density=0.6)


@pytest.mark.usefixtures("lossy")
def test_calibrations_with_such_a_recipe_measure_exact_attention() -> None:
    assert of_command({"recipe": "near-exact"}, "warmup") == {"quantize": "fp8-rowwise", "attention": "fa3-fp8"}
    assert of_command({"recipe": "fast"}, "warmup") == {"attention": "sparse", "density": 0.5}
    for command in ("calibrate-magcache", "calibrate-attention"):
        assert of_command({"recipe": "near-exact"}, command) == {"quantize": "fp8-rowwise"}
        assert of_command({"recipe": "fast"}, command) == {}
    own = {"recipe": "fast", "lists_every": 3}
    assert of_command(own, "calibrate-attention") == {"lists_every": 3}
    with pytest.raises(ConfigError, match="--attention sparse: `wanfast calibrate-magcache` measures exact"):
        of_command({"recipe": "fast", "attention": "sparse"}, "calibrate-magcache")


def test_only_the_recipe_s_own_kernel_is_the_recipe_s() -> None:
    assert has_lossy_attention("near-exact", "fa3-fp8") and has_lossy_attention("fast", "fa3-fp8")
    others: list[tuple[RecipeName | None, Attention]] = [
        (None, "fa3-fp8"), ("exact", "fa3-fp8"), ("near-exact", "sparse"), ("near-exact", "auto"), ("fa3", "fa3"),
    ]  # fmt: skip
    assert not any(has_lossy_attention(*other) for other in others)


def test_models_are_shared_by_what_a_recipe_sets() -> None:
    assert config_of(recipe="near-exact").models == config_of(**RECIPES["near-exact"].options).models


def test_the_plan_names_the_recipe_and_what_overrides_it(wanfast: Wanfast) -> None:
    magcache = ("--recipe", "magcache", "--attention", "math", "--magcache", "E024K2R10")
    outcome = wanfast("generate", "--model", "tiny", *STAR, *magcache, "--dry-run")
    assert outcome.exit_code == 0, outcome.err
    assert "recipe: magcache, but --attention math, --magcache-thresh 0.24, --retention-ratio 0.1" in rows(outcome.out)


def rows(out: str) -> str:
    lines = [line.strip(" │").split(None, 1) for line in out.splitlines()]
    return "\n".join(": ".join(line) for line in lines)


def test_a_line_of_a_list_has_its_own_recipe(wanfast: Wanfast, workdir: Path) -> None:
    lines = ({"recipe": "exact", "output": "a.mp4"}, {"recipe": "magcache", "attention": "math", "output": "b.mp4"})
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = wanfast("generate", "--model", "tiny", *STAR, "--jobs", "jobs.jsonl", "--dry-run", "--json")
    first, second = json.loads(outcome.out)["results"]
    assert first["effective"]["models"]["vae_precision"] == "fp32" and first["effective"]["skipping"] is None
    assert second["effective"]["skipping"]["magcache_thresh"] == 0.12
    assert [each["plan"]["recipe"] for each in (first, second)] == ["exact", "magcache"]


def test_an_unknown_recipe_is_refused_with_the_names(wanfast: Wanfast) -> None:
    outcome = wanfast("generate", "--model", "tiny", *STAR, "--recipe", "slow")
    assert outcome.exit_code == 2
    assert outcome.err.startswith("error: --recipe 'slow': one of exact, near-exact, fast, lightning-4, ")


def test_other_commands_take_the_options_of_a_recipe_that_they_have() -> None:
    given = {"recipe": "fastest-original", "num_gpus": 2, "attention": "math", "steps": 4}
    measured = of_command(given, "calibrate-magcache")
    assert measured == {
        "attention": "math", "tf32": True, "compile": True, "num_gpus": 2, "steps": 4, **SHARDED
    }  # fmt: skip


@pytest.mark.parametrize("command", ["warmup", "calibrate-magcache"])
def test_other_commands_read_the_recipe(wanfast: Wanfast, command: str) -> None:
    outcome = wanfast(command, "--model", "tiny", "--device", "cpu", "--recipe", "fa3")
    assert outcome.exit_code == 2
    assert outcome.err.startswith("error: --attention fa3")
