"""Tests MagCache in the loop: the same plan and latents on every mesh, with sharded, offloaded and compiled experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compiling import compiler
from tests.engine.test_rank_groups import final_latents, latents_of, shown, with_options
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import blank_inputs, frames_of, plan_small_model
from wanfast.runtime.config import SkippingConfig
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import BRANCHES
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.models.dit import Block
from wanfast.runtime.planning.placement import check_skips, modes, needed, place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.sampling.magcache import ResidualCache
from wanfast.runtime.store.curves import Curve
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.experts import OffloadedExperts

# Eight steps, three with high noise. Branches differ, and each expert skips, the high-noise one also at its end.
RATIOS = ((1.0, 1.0), (0.99, 0.9), (0.98, 0.99), (0.7, 0.7), (0.99, 0.98), (0.97, 0.9), (0.99, 0.99), (0.98, 0.7))
APART = [tuple(letter == "." for letter in step) for step in ("##", ".#", "..", "##", "..", ".#", "#.", ".#")]


@pytest.fixture
def planned(small_model: Path, workdir: Path) -> tuple[Plan, ModelFiles]:
    """Returns a plan without skipping, of 40 tokens."""
    plan, files = plan_small_model(small_model, steps=8)
    assert plan.experts.count("high_noise") == 3
    return plan, files


def skipping(plan: Plan, **options: object) -> Plan:
    settings = {
        "magcache": "preset", "magcache_thresh": 0.06, "magcache_k": 2, "retention_ratio": 0.0,
        "magcache_rule": "both-experts", "magcache_joint": "off",
    }  # fmt: skip
    return dataclasses.replace(with_options(plan, **settings | options), curve=Curve("preset", RATIOS))


def test_what_is_skipped_does_not_run(planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned
    ran: list[int] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: ran.append(1) or forward(self, *a))
    whole = final_latents(plan, files, Ranks("cpu"))
    assert len(ran) == 16 * files.spec.dit.num_layers
    ran.clear()
    plan = skipping(plan)
    assert plan.skips == APART
    kept: list[tuple[int, str]] = []
    keep = ResidualCache.keep
    monkeypatch.setattr(ResidualCache, "keep", lambda self, *a: kept.append(a[:2]) or keep(self, *a))
    latents = final_latents(plan, files, Ranks("cpu"))
    wanted = [
        (step, name)
        for step in range(7)
        for branch, name in enumerate(BRANCHES)
        if not APART[step][branch] and APART[step + 1][branch]
    ]
    assert kept == wanted  # no unused residual is stored
    assert len(ran) == (16 - sum(map(sum, APART))) * files.spec.dit.num_layers
    assert 1e-4 < relative_error(latents, whole) < 1


@pytest.mark.parametrize("mesh", [Mesh(ulysses=2), Mesh(cfg=2, ulysses=2)], ids=shown)
def test_every_mesh_skips_alike(planned: tuple[Plan, ModelFiles], mesh: Mesh) -> None:
    plan, files = planned
    combinations = [
        (fsdp, joint)
        for fsdp in ("off", "on")
        for joint in ("on", "off")
        if (mesh.cfg, fsdp, joint) != (2, "on", "off")  # all but the refused combination
    ]
    whole = {joint: skipping(plan, magcache_joint=joint) for joint in ("on", "off")}
    expected = dict(zip(whole, latents_of(list(whole.values()), files, Ranks("cpu")), strict=True))
    of_mesh = {"cfg_parallel": mesh.cfg, "ulysses": mesh.ulysses}
    sharded = [
        with_options(whole[joint], dit_fsdp=fsdp, t5_fsdp=fsdp, artifacts_dir=f"artifacts-{fsdp}", **of_mesh)
        for fsdp, joint in combinations
    ]
    assert [own.skips for own in sharded] == [whole[joint].skips for _, joint in combinations]
    results = on_ranks(
        mesh, lambda ranks: latents_of(sharded[:2], files, ranks) + latents_of(sharded[2:], files, ranks)
    )
    for (fsdp, joint), *got in zip(combinations, *results, strict=True):
        error = max(relative_error(latents, expected[joint]) for latents in got)
        print(f"{shown(mesh)}, FSDP {fsdp}, joint {joint}: relative error of the final latents {error:.1e}")
        assert error <= 1e-5, (fsdp, joint)
        assert all(torch.equal(latents, got[0]) for latents in got), (fsdp, joint)


def test_extrapolated_residuals_are_those_of_one_rank(planned: tuple[Plan, ModelFiles]) -> None:
    plan, files = planned
    plan = skipping(plan)
    extrapolated = skipping(plan, magcache_extrapolate=True)
    assert extrapolated.skips == plan.skips
    expected, reused = latents_of([extrapolated, plan], files, Ranks("cpu"))
    assert relative_error(expected, reused) > 1e-5
    of_mesh = with_options(extrapolated, cfg_parallel=2, ulysses=2)
    for got in on_ranks(Mesh(cfg=2, ulysses=2), lambda ranks: final_latents(of_mesh, files, ranks)):
        assert relative_error(got, expected) <= 1e-5


def test_sharded_experts_cannot_skip_apart(planned: tuple[Plan, ModelFiles]) -> None:
    """A rank would wait for weights that the other ranks do not gather."""
    plan, _ = planned
    plan = skipping(with_options(plan, num_gpus=2, dit_fsdp="on"))
    (placed,) = place([plan])
    with pytest.raises(ConfigError, match="--magcache-joint off with sharded experts"):
        check_skips(placed)
    (alone,) = place([with_options(plan, cfg_parallel=1)])
    check_skips(alone)
    assert alone.skips == APART


@pytest.mark.parametrize("cfg", [1, 2])
def test_branches_skip_together_on_every_mesh_by_default(planned: tuple[Plan, ModelFiles], cfg: int) -> None:
    plan, _ = planned
    both = skipping(plan, magcache_joint=SkippingConfig.magcache_joint, cfg_parallel=cfg)
    assert all(first == second for first, second in both.skips)
    document = plan_json(both)["magcache"]
    assert document["joint"] and document["skipped_forwards_apart"] == sum(map(sum, APART))
    assert document["skipped_forwards"] == sum(map(sum, both.skips)) < document["skipped_forwards_apart"]


@torch.inference_mode()
def test_offloaded_experts_skip_too(planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's weights are copied once, and the second expert's blocks follow the first expert's last call."""
    plan, files = planned
    expected = final_latents(skipping(plan), files, Ranks("cpu"))
    events: list[str] = []
    overwrite, forward = OffloadedExperts._overwrite, Block.forward

    def copied(self: OffloadedExperts, expert: str, chosen: Callable[[str], bool]) -> None:
        events.extend(f"{expert} {name}" for name in self._parameters if chosen(name))
        overwrite(self, expert, chosen)

    def ran(self: Block, *arguments: object) -> object:
        events.append("block")
        return forward(self, *arguments)

    monkeypatch.setattr(OffloadedExperts, "_overwrite", copied)
    monkeypatch.setattr(Block, "forward", ran)
    got = final_latents(skipping(plan, expert_offload="on"), files, Ranks("cpu"))
    assert torch.equal(got, expected)
    copies = [event for event in events if event != "block"]
    assert len(copies) == len(set(copies))
    first = next(k for k, event in enumerate(events) if event.startswith("low_noise blocks.0."))
    # high noise computes both branches of step 0 and, of step 1, only the negative prompt's branch
    assert events[:first].count("block") == 2 * files.spec.dit.num_layers + 1


@torch.inference_mode()
def test_a_second_video_starts_clean(planned: tuple[Plan, ModelFiles]) -> None:
    plan, files = planned
    plan = skipping(plan)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    image, text = blank_inputs(plan, files)
    first = frames_of(pipeline, plan, image, text)
    frames_of(pipeline, plan, image + 1, text)
    assert np.array_equal(frames_of(pipeline, plan, image, text), first)


@torch.inference_mode()
def test_compiled_blocks_stay_one_graph(planned: tuple[Plan, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned
    plan = skipping(plan)
    expected = final_latents(plan, files, Ranks("cpu"))
    compiler(monkeypatch, loading)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = final_latents(with_options(plan, compile=True), files, Ranks("cpu"))
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8-dynamic", "fp8-rowwise"])
def test_quantized_experts_skip_too(planned: tuple[Plan, ModelFiles], scheme: str) -> None:
    """Two ranks give the latents of one rank, because both reuse the same residual."""
    plan, files = planned
    plan = skipping(plan, precision="bf16", quantize=scheme, quantize_on_the_fly=True)
    expected = final_latents(plan, files, Ranks("cpu"))
    for latents in on_ranks(Mesh(cfg=2), lambda ranks: final_latents(plan, files, ranks)):
        assert torch.equal(latents, expected)


def test_residuals_count_in_the_memory_of_a_rank(planned: tuple[Plan, ModelFiles]) -> None:
    plan, files = planned
    spec, geometry = files.spec, plan.geometry
    for mesh, tokens in ((Mesh(), 40), (Mesh(ulysses=4), 10), (Mesh(ulysses=3), 14)):
        need, without = (needed(spec, plan.config.models, geometry, mesh, num_residuals=number) for number in (2, 0))
        assert need.residuals == 2 * 4 * spec.dit.dim * tokens and without.residuals == 0
        need, without = (dataclasses.replace(each, vae=0) for each in (need, without))  # the loop needs the most
        more, less = modes(need, mesh.group_size), modes(without, mesh.group_size)
        assert {mode: more[mode] - less[mode] for mode in more} == dict.fromkeys(less, need.residuals)
