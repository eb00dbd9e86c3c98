"""Tests distilled schedules and guidance that stops, in the loop: against float64, on every mesh, with MagCache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.test_rank_groups import final_latents, latents_of, shown, with_options
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import blank_inputs, plan_small_model
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading, pipeline
from wanfast.runtime.engine.conditioning import draw_noises
from wanfast.runtime.engine.denoise import denoise
from wanfast.runtime.facts.choices import Branch, Expert
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.models.dit import Block
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.sampling.guidance import Guidance
from wanfast.runtime.store.curves import Curve
from wanfast.runtime.store.model_files import ModelFiles

RCM = {"sigmas": "0.99502,0.93378,0.8529,0.60898", "solver": "rcm"}
UNGUIDED = {"guidance_high_noise": 1.0, "guidance_low_noise": 1.0}
HYBRID = {"sigmas": "0.98,0.95,0.92,0.75,0.4", "solver": "unipc-euler", "guidance_low_noise": 1.0}
FLAT = ((1.0, 1.0),) * 8  # ratios by which every step may be skipped


@pytest.fixture
def gated(small_model: Path, workdir: Path) -> tuple[Plan, ModelFiles]:
    """Returns a plan of 3 + 5 steps, of which 2 + 2 are guided."""
    plan, files = plan_small_model(small_model, steps=8, guidance_gate=0.5)
    assert plan.guided == [True, True, False, True, True, False, False, False]
    return plan, files


def skipping(plan: Plan, ratios: Sequence[tuple[float, float]] = FLAT) -> Plan:
    options = {"magcache": "preset", "magcache_thresh": 1.0, "magcache_k": 2, "retention_ratio": 0.0}
    return dataclasses.replace(
        with_options(plan, magcache_rule="both-experts", **options), curve=Curve("preset", tuple(ratios))
    )


def velocity(sample: Tensor, timestep: int, branch: Branch, expert: Expert) -> Tensor:
    factor = {"prompt": 1.1, "negative_prompt": 0.7}[branch] + {"high_noise": 0.0, "low_noise": 0.3}[expert]
    return torch.tanh(factor * sample) * (1.5 - timestep / 1000)


def test_the_loop_with_a_gate_is_the_formula_in_float64(gated: tuple[Plan, ModelFiles]) -> None:
    plan, _ = gated
    plan = with_options(plan, solver="euler")
    plan = Plan.of(plan.config, plan.spec, (64, 48))
    noise = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ran: list[tuple[int, Expert, int]] = []

    def velocities(
        index: int, expert: Expert, branches: Sequence[Branch], sample: Tensor, timestep: int
    ) -> list[Tensor]:
        ran.append((index, expert, len(branches)))
        return [velocity(sample, timestep, branch, expert) for branch in branches]

    guidance = Guidance(plan.experts, plan.guidance, plan.guided)
    got = denoise(noise, plan.schedule, plan.experts, velocities, guidance=guidance)
    sigmas, x = plan.levels.sigmas, noise
    difference: dict[Expert, Tensor] = {}
    for index, (expert, timestep) in enumerate(zip(plan.experts, plan.levels.timesteps, strict=True)):
        prompt = velocity(x, timestep, "prompt", expert)
        if index in (0, 1, 3, 4):
            difference[expert] = prompt - velocity(x, timestep, "negative_prompt", expert)
        v = prompt + (plan.guidance[expert] - 1) * difference[expert]
        x = x + (sigmas[index + 1] - sigmas[index]) * v
    assert (got - x).abs().max() < 1e-12
    wanted = [2, 2, 1, 2, 2, 1, 1, 1]
    assert ran == [(index, expert, wanted[index]) for index, expert in enumerate(plan.experts)]
    assert plan.num_forwards == sum(wanted) == 12


def test_four_ranks_give_the_latents_of_one(gated: tuple[Plan, ModelFiles]) -> None:
    """With a gate, and with a gate and MagCache, whose residuals a rank must hold when the prompt is skipped."""
    plan, files = gated
    plans = [plan, skipping(plan)]
    expected = latents_of(plans, files, Ranks("cpu"))
    assert relative_error(expected[1], expected[0]) > 1e-4
    of_mesh = {"cfg_parallel": 2, "ulysses": 2}
    ways = [with_options(each, artifacts_dir=name, **of_mesh) for each, name in zip(plans, ("a", "b"), strict=True)]
    ways.append(with_options(ways[1], dit_fsdp="on", t5_fsdp="on", artifacts_dir="c"))
    assert ways[1].skips == ways[2].skips == plans[1].skips
    results = on_ranks(
        Mesh(cfg=2, ulysses=2), lambda ranks: latents_of(ways[:2], files, ranks) + latents_of(ways[2:], files, ranks)
    )
    for wanted, got in zip((*expected, expected[1]), zip(*results, strict=True), strict=True):
        assert all(relative_error(latents, wanted) <= 1e-5 for latents in got)
        assert all(torch.equal(latents, got[0]) for latents in got)


def test_both_sides_of_a_gate_are_computed(gated: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = gated
    free = skipping(with_options(plan, guidance_gate=1.0))
    free = dataclasses.replace(Plan.of(free.config, free.spec, (64, 48)), curve=free.curve)
    assert [skips[0] for skips in free.skips] == [False, True, True, False, True, True, False, True]
    plan = skipping(plan)
    document = plan_json(plan)["magcache"]
    assert document["always_computed"] == [1, 2, 4, 5] and document["distilled_steps"] == 0
    assert plan.skips == [(False, False)] * 6 + [(True, False)] * 2
    ran: list[int] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: ran.append(1) or forward(self, *a))
    final_latents(plan, files, Ranks("cpu"))
    assert len(ran) == (12 - 2) * files.spec.dit.num_layers


def test_only_the_base_part_of_a_hybrid_is_skipped(small_model: Path, workdir: Path) -> None:
    plan, _ = plan_small_model(small_model, steps=None, shift=None, **HYBRID)
    assert plan.experts.count("high_noise") == 3 and plan.num_forwards == 8
    plan = skipping(plan, FLAT[:3])
    assert plan.always_computed == [3, 4]
    assert plan.skips == [(False, False), (True, True), (True, True), (False, False), (False, False)]
    assert plan_json(plan)["magcache"]["distilled_steps"] == 2


@pytest.mark.parametrize(("options", "start"), [(RCM, 0.99502), (RCM | {"solver": "unipc"}, 1.0)], ids=["rcm", "unipc"])
def test_the_loop_starts_at_the_first_level(
    small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], start: float
) -> None:
    plan, files = plan_small_model(small_model, **options, **UNGUIDED)
    begun: list[Tensor] = []
    monkeypatch.setattr(pipeline, "denoise", lambda noise, *a, **k: begun.append(noise) or noise)
    final_latents(plan, files, Ranks("cpu"))
    assert torch.equal(begun[0], next(draw_noises(7, plan.geometry, 16, "cpu")) * start)


@torch.inference_mode()
@pytest.mark.parametrize("mesh", [Mesh(cfg=2), Mesh(ulysses=2)], ids=shown)
def test_fresh_noise_is_the_leaders_on_every_rank(small_model: Path, workdir: Path, mesh: Mesh) -> None:
    """The ranks would drift apart if each drew its own."""
    plan, files = plan_small_model(small_model, **RCM, **UNGUIDED)
    assert plan.levels.start == plan.levels.sigmas[0] < 1
    expected = final_latents(plan, files, Ranks("cpu"))
    other = final_latents(with_options(plan, seed=8), files, Ranks("cpu"))
    assert relative_error(other, expected) > 0.1
    got = on_ranks(mesh, lambda ranks: final_latents(plan, files, ranks))
    assert all(relative_error(latents, expected) <= 1e-5 for latents in got)
    assert torch.equal(got[0], got[1])


def test_further_noises_are_not_the_first_one_again(
    gated: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, files = gated
    made = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    drawn: list[Tensor] = []

    def denoised(noise: Tensor, *arguments: object, fresh_noise: Callable[[], Tensor], **options: object) -> Tensor:
        drawn.extend((noise, fresh_noise(), fresh_noise()))
        return noise

    monkeypatch.setattr(pipeline, "denoise", denoised)
    made.latent(plan, *blank_inputs(plan, files), Stopwatch("cpu"), lambda *_: None, plan.residuals())
    again = draw_noises(7, plan.geometry, 16, "cpu")
    assert plan.levels.start == 1 and all(torch.equal(noise, next(again)) for noise in drawn)
    assert len({float(noise.sum()) for noise in drawn}) == 3


@torch.inference_mode()
def test_offloaded_experts_follow_a_gate(gated: tuple[Plan, ModelFiles]) -> None:
    """The second expert is loaded during the last forward of the first one, which has one branch behind the gate."""
    plan, files = gated
    assert pipeline._handover(plan, Ranks("cpu")) == (2, "prompt")
    expected = final_latents(plan, files, Ranks("cpu"))
    assert torch.equal(final_latents(with_options(plan, expert_offload="on"), files, Ranks("cpu")), expected)


def test_residuals_of_a_skipped_plan_are_freed(gated: tuple[Plan, ModelFiles]) -> None:
    cache = skipping(gated[0]).residuals()
    cache.keep(5, "prompt", "residual")
    assert cache.wants(5, "prompt") and not cache.wants(4, "negative_prompt")
    assert [cache.reuse(step, "prompt") for step in (5, 6, 7)] == [None, "residual", "residual"]
    assert not any(cache._residuals.values())
