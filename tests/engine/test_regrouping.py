"""Tests ranks that regroup: a step with guidance runs as cfg 2 x Ulysses N/2, one without as Ulysses N."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiling import compiler
from tests.engine.test_few_steps import HYBRID, UNGUIDED, skipping
from tests.engine.test_rank_groups import shown, with_options
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import blank_inputs, plan_small_model
from wanfast.magcache_calib import calibrate
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading
from wanfast.runtime.engine.session import Session
from wanfast.runtime.facts.choices import Branch
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.jobs import warmup
from wanfast.runtime.models.dit import Block, Stream, WanDiT
from wanfast.runtime.planning.placement import FreeMemory, place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.experts import OffloadedExperts

TOKENS, LAYERS = 40, 2
# Videos by which expert's steps have guidance, and the steps that have it.
VIDEOS: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"steps": 8, "guidance_gate": 0.5}, "++-++---"),
    "hybrid": ({"steps": None, "shift": None, **HYBRID}, "+++--"),
    "one expert": ({"guidance_high_noise": 1.0}, "--++"),
    "none": (UNGUIDED, "----"),
}
Inputs = tuple[Tensor, dict[Branch, Tensor]]  # an image, and the text of each branch
FSDP = {"dit_fsdp": "on", "t5_fsdp": "on", "artifacts_dir": "sharded"}


def planned(folder: Path, video: str, mesh: Mesh, **options: object) -> tuple[Plan, ModelFiles]:
    own, guided = VIDEOS[video]
    plan, files = plan_small_model(folder, **own)
    assert plan.guided == [step == "+" for step in guided] and plan.geometry.tokens == TOKENS
    return with_options(plan, cfg_parallel=mesh.cfg, ulysses=mesh.ulysses, num_gpus=mesh.size, **options), files


@torch.inference_mode()
def counted(plans: Sequence[Plan], files: ModelFiles, inputs: Inputs, ranks: Ranks) -> list[tuple[Tensor, list[int]]]:
    """Makes a latent for each plan with the same models; returns it with the tokens of each block on this rank."""
    forward = Block.forward
    done: list[int] = []

    def counting(self: Block, stream: Stream, *others: Any) -> Stream:
        done.append(stream.added.shape[1])
        return forward(self, stream, *others)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "forward", counting)
        pipeline = loading.load_models(files, plans[0].config, ranks, Stopwatch("cpu"))
        found = []
        for plan in plans:
            done.clear()
            latent = pipeline.latent(plan, *inputs, Stopwatch("cpu"), lambda *_: None, plan.residuals())
            found.append((latent.clone(), list(done)))
        return found


def work_of(plan: Plan) -> list[int]:
    """Returns the tokens of each block that a rank runs: its share of all tokens in each step.

    The first step also runs one block as the ranks will share it after they have regrouped.
    """
    tokens = {True: TOKENS // plan.mesh.ulysses, False: TOKENS // plan.mesh.size}
    steps = zip(plan.guided, plan.skips, strict=True)
    share = [tokens[guided] for guided, skips in steps if not skips[0] for _ in range(LAYERS)]
    return [tokens[later] for later in (not plan.guided[0],) if later in plan.guided] + share


@pytest.mark.parametrize(
    ("mesh", "fsdp"),
    [
        pytest.param(Mesh(cfg=2), {}, id="2 ranks"),
        pytest.param(Mesh(cfg=2, ulysses=2), FSDP, id="4 ranks, sharded"),
        pytest.param(Mesh(cfg=2, ulysses=4), FSDP, id="8 ranks, sharded", marks=pytest.mark.long),
    ],
)
def test_no_rank_repeats_anothers_work(small_model: Path, workdir: Path, mesh: Mesh, fsdp: dict[str, str]) -> None:
    """Latents equal those of one rank, and each rank has its share of tokens.

    MagCache computes the first step after a regrouping, and then skips with the residual of the new share.
    """
    made = [planned(small_model, video, mesh) for video in VIDEOS]
    plans, files = [plan for plan, _ in made], made[0][1]
    plans.append(skipping(plans[0]))
    assert plans[-1].skips == [(False, False)] * 6 + [(True, False)] * 2
    inputs = blank_inputs(plans[0], files)
    expected = [latent for latent, _ in counted(plans, files, inputs, Ranks("cpu"))]
    assert all(relative_error(*pair) > 1e-4 for pair in itertools.combinations(expected, 2))
    if mesh.size == 8:  # the last plan has the first one's steps, two of them skipped
        plans, expected = plans[1:], expected[1:]
    ways = [with_options(plan, **fsdp) for plan in plans]
    results = on_ranks(mesh, lambda ranks: counted(ways, files, inputs, ranks))
    for plan, wanted, *got in zip(plans, expected, *results, strict=True):
        error = max(relative_error(latent, wanted) for latent, _ in got)
        print(f"{shown(mesh)}, {plan.guided}, {fsdp}: relative error of the final latents {error:.1e}")
        assert error <= 1e-5
        assert all(torch.equal(latent, got[0][0]) for latent, _ in got)
        assert [done for _, done in got] == [work_of(plan)] * mesh.size


def test_residuals_are_not_extrapolated_across_a_regrouping(small_model: Path, workdir: Path) -> None:
    """A rank holds other tokens behind it. Within a grouping they are, before it and behind it."""
    plan, files = plan_small_model(small_model, steps=24, guidance_gate=0.5)
    plan = with_options(plan, cfg_parallel=2, num_gpus=2)
    plan = skipping(plan, [(1.0, 1.0)] * 24)
    plan = with_options(plan, magcache_extrapolate=True, magcache_k=1)
    inputs = blank_inputs(plan, files)
    behind = [step for step, of in plan.residuals()._terms["prompt"].items() if len(of) == 2 and not plan.guided[step]]
    before = [step for step, of in plan.residuals()._terms["prompt"].items() if len(of) == 2 and plan.guided[step]]
    assert behind and before
    ((expected, _),) = counted([plan], files, inputs, Ranks("cpu"))
    ((reused, _),) = counted([with_options(plan, magcache_extrapolate=False)], files, inputs, Ranks("cpu"))
    assert relative_error(reused, expected) > 1e-5
    for ((latent, _),) in on_ranks(Mesh(cfg=2), lambda ranks: counted([plan], files, inputs, ranks)):
        assert relative_error(latent, expected) <= 1e-5


def test_offloaded_experts_follow(small_model: Path, workdir: Path) -> None:
    """Each weight is copied once: the second expert's during the first one's last forward, which all ranks share."""
    plan, files = planned(small_model, "gate", Mesh(cfg=2), expert_offload="on")
    inputs = blank_inputs(plan, files)
    ((expected, _),) = counted([with_options(plan, expert_offload="off")], files, inputs, Ranks("cpu"))
    overwrite = OffloadedExperts._overwrite

    def work(ranks: Ranks) -> tuple[Tensor, list[str]]:
        copies: list[str] = []

        def copied(self: OffloadedExperts, expert: str, chosen: Callable[[str], bool]) -> None:
            copies.extend(f"{expert} {name}" for name in self._parameters if chosen(name))
            overwrite(self, expert, chosen)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(OffloadedExperts, "_overwrite", copied)
            return counted([plan], files, inputs, ranks)[0][0], copies

    for latent, copies in on_ranks(Mesh(cfg=2), work):
        assert relative_error(latent, expected) <= 1e-5
        assert len(copies) == len(set(copies)) == 2 * len(list(WanDiT(files.spec.dit).parameters())) - 8 * LAYERS


@pytest.mark.parametrize(
    ("mesh", "fsdp"),
    [
        pytest.param(Mesh(cfg=2), {}, id="2 ranks", marks=pytest.mark.long),
        pytest.param(Mesh(cfg=2), FSDP, id="2 ranks, sharded"),
        pytest.param(Mesh(cfg=2, ulysses=2), FSDP, id="4 ranks, sharded", marks=pytest.mark.long),
    ],
)
def test_a_compiled_block_has_a_graph_for_each_share(
    small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, fsdp: dict[str, str]
) -> None:
    plan, files = planned(small_model, "gate", mesh)
    plan, inputs = skipping(plan), blank_inputs(plan, files)
    ((expected, _),) = counted([plan], files, inputs, Ranks("cpu"))
    counter, plan = compiler(monkeypatch, loading), with_options(plan, compile=True, **fsdp)

    def two_videos(ranks: Ranks) -> tuple[list[Tensor], int]:
        pipeline = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
        caches = [plan.residuals() for _ in range(2)]
        made = [pipeline.latent(plan, *inputs, Stopwatch("cpu"), lambda *_: None, cache).clone() for cache in caches]
        return made, counter.frame_count

    for (first, second), graphs in on_ranks(mesh, two_videos):
        assert relative_error(first, expected) <= 1e-5 and torch.equal(first, second)
        assert graphs == 2


@torch.inference_mode()
def test_a_warmup_compiles_both_shares(small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warmup does not know whether a video will have guidance in each step."""
    plan, _ = plan_small_model(small_model)
    plan = with_options(plan, num_gpus=2, cfg_parallel=2, ulysses=1, compile=True, attention="math", dit_fsdp="off")
    assert not plan.regroups
    counter = compiler(monkeypatch, warmup)

    def warm(ranks: Ranks) -> int:
        warmup._forward(plan, ranks, Stopwatch("cpu"), "math")
        return counter.frame_count

    assert on_ranks(Mesh(cfg=2), warm) == [2, 2]


def test_experts_in_8_bits_regroup(small_model: Path, workdir: Path) -> None:
    """On two ranks, one layer computes q, k and v together for guided steps, and each by its rows for the others."""
    eight_bits = {"precision": "bf16", "quantize": "int8-dynamic", "quantize_on_the_fly": True}
    plan, files = planned(small_model, "hybrid", Mesh(cfg=2), **eight_bits)
    inputs = blank_inputs(plan, files)
    ((expected, _),) = counted([plan], files, inputs, Ranks("cpu"))
    for ((latent, done),) in on_ranks(Mesh(cfg=2), lambda ranks: counted([plan], files, inputs, ranks)):
        assert relative_error(latent, expected) <= 1e-3
        assert done[-1] == TOKENS // 2


def test_a_calibration_does_not_regroup(small_model: Path, workdir: Path) -> None:
    """A residual is compared with that of the step before, token by token, so no token may leave its rank."""
    plan, _ = planned(small_model, "one expert", Mesh(cfg=2))
    assert plan.regroups

    def measured(ranks: Ranks) -> Any:
        opened = Session.open(plan.config, ranks)
        return calibrate.measure(0, plan.job(), opened, lambda *_: None)["steps"]

    expected = measured(Ranks("cpu"))
    assert expected[2]["prompt"]["ratio"] > 0
    for steps in on_ranks(Mesh(cfg=2), measured):
        for got, wanted in zip(steps, expected, strict=True):
            assert got["prompt"] == pytest.approx(wanted["prompt"], abs=1e-5)


def place_on(plan: Plan, num_gpus: int, **options: object) -> Plan:
    memory = FreeMemory(1 << 40, "free", 1 << 40)
    (placed,) = place([with_options(plan, num_gpus=num_gpus, **options)], memory)
    return placed


def test_the_plan_states_the_regrouping(small_model: Path, workdir: Path) -> None:
    plan, _ = plan_small_model(small_model, **VIDEOS["gate"][0])
    found = place_on(plan, 8)
    assert found.mesh == Mesh(cfg=2, ulysses=4) and found.regroups
    assert plan_json(found)["unguided_mesh"] == {"replica": 1, "cfg": 1, "ulysses": 8}
    assert found.notes == plan.notes
    whole = place_on(with_options(plan, guidance_gate=1.0), 8)
    assert all(whole.guided) and not whole.regroups and plan_json(whole)["unguided_mesh"] is None
    alone = place_on(plan, 8, cfg_parallel=1)
    assert alone.mesh == Mesh(ulysses=8) and not alone.regroups
    two_groups = place_on(plan, 8, ulysses=2)
    assert two_groups.unguided_mesh == Mesh(replica=2, ulysses=4)


def test_ranks_that_cannot_share_the_heads_do_not_regroup(small_model: Path, workdir: Path) -> None:
    """Eight heads give Ulysses at most eight ranks."""
    plan, _ = plan_small_model(small_model, **VIDEOS["gate"][0])
    placed = place_on(plan, 16)
    assert placed.mesh == Mesh(cfg=2, ulysses=8) and not placed.regroups
    assert plan_json(placed)["unguided_mesh"] is None
    assert placed.notes[-1] == (
        "in 4 steps without guidance, both halves of the 16 ranks do the same work, because 16 ranks cannot share 8 "
        "attention heads"
    )
