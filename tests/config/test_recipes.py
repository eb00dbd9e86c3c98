"""Tests the recipes: which options each one sets, and that given options override them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.conftest import Outcome
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, of_command
from wanfast.runtime.config.recipes import RECIPES, overridden, with_recipe
from wanfast.runtime.facts.choices import RecipeName
from wanfast.runtime.facts.model_spec import A14B

Wanfast = Callable[..., Outcome]
STAR = ("--image", "cat.png", "--prompt", "a cat", "--seed", "1", "--device", "cpu")
SHARDED = {"cfg_parallel": 1, "dit_fsdp": "on", "t5_fsdp": "on"}
SKIPS = {"magcache": "E012K2R20", "magcache_joint": "off"}


def config_of(**given: Any) -> EffectiveConfig:
    return EffectiveConfig.of({**NO_VIDEO, **given}, A14B)


def test_the_names_are_the_recipes() -> None:
    assert list(RECIPES) == list(get_args(RecipeName))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("baseline", {"attention": "flash", **SHARDED}),
        ("fa3-tf32", {"attention": "fa3", "tf32": True, **SHARDED}),
        ("int8", {"attention": "fa3", "quantize": "int8-weight-only", "cfg_parallel": 1}),
        ("magcache", {"attention": "fa3", **SKIPS, **SHARDED}),
        ("fastest-original", {"attention": "fa3", "tf32": True, "compile": True, **SKIPS, **SHARDED}),
        ("exact", {"vae_precision": "fp32"}),
        ("fast", {"quantize": "fp8-rowwise", "magcache": "E012K2R20", "magcache_rule": "both-experts"}),
    ],
)
def test_a_recipe_is_its_options(name: RecipeName, options: dict[str, Any]) -> None:
    assert with_recipe({"recipe": name, "num_gpus": 8}) == {"recipe": name, "num_gpus": 8, **options}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("ranks", [1, 8])
def test_every_recipe_is_a_config(name: RecipeName, ranks: int) -> None:
    config = config_of(recipe=name, num_gpus=ranks)
    assert overridden(config.options()) == {}
    assert (config.ranks.dit_fsdp == "on") is (ranks == 8 and name in with_sharding())
    assert EffectiveConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def with_sharding() -> set[str]:
    return {name for name, recipe in RECIPES.items() if "dit_fsdp" in recipe.of_several_ranks}


def test_given_options_override_a_recipe() -> None:
    config = config_of(recipe="fa3-tf32", attention="math", tf32=None)
    assert (config.models.attention, config.models.tf32) == ("math", True)  # None is not given
    assert overridden(config.options()) == {"attention": "math"}
    unskipped = config_of(recipe="magcache", magcache="off")
    assert unskipped.skipping is None
    assert overridden(unskipped.options()) == {"magcache": "off"}
    again = EffectiveConfig.of(config.options(), A14B)  # as `--from` does
    assert again.models == config.models and again.models.recipe == "fa3-tf32"


def test_models_are_shared_by_what_a_recipe_sets() -> None:
    assert config_of(recipe="near-exact").models == config_of(quantize="fp8-rowwise").models


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
    assert outcome.err.startswith("error: --recipe 'slow': one of baseline, fa3, ")


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
