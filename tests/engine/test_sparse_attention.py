"""Tests sparse attention in the loop: which calls are sparse, by which lists, on any mesh and beside MagCache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_magcache_loop import APART, skipping
from tests.engine.test_rank_groups import final_latents, latents_of, with_options
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import blank_inputs, plan_small_model
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe, loading, lossy_attention, session, sparse_attention
from wanfast.runtime.engine.attention_probe import choose
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.errors import CancelledError, ConfigError
from wanfast.runtime.facts import sparsity
from wanfast.runtime.facts.choices import BRANCHES, Branch
from wanfast.runtime.facts.densities import Densities
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.machine import packages
from wanfast.runtime.models import attention_kernels
from wanfast.runtime.models.attention import HeadOrder
from wanfast.runtime.models.bricks import RASTER, TokenOrder, brick_order
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.magcache import ResidualCache
from wanfast.runtime.store.model_files import ModelFiles

# 455 tokens: three blocks and 71 tokens, which two and four ranks do not divide; 13 columns are two bricks.
SIZE = {"size": "208x112", "frames": 17}
HALF = {"attention": "sparse", "density": 0.5}
NO_GUARDS = {"dense_share": 0.0, "dense_layers": 0}
Planned = Callable[..., tuple[Plan, ModelFiles]]


@pytest.fixture
def planned(small_text_model: Path, workdir: Path) -> Planned:
    """Returns a function that plans a video of 455 tokens with a small model, which has two layers.

    It makes videos from text alone: encoding an image would take as long as the attention.
    """
    return lambda **options: plan_small_model(small_text_model, **SIZE, **options)


@torch.inference_mode()
def made(
    plan: Plan, files: ModelFiles, ranks: Ranks, pipeline: VideoPipeline | None = None
) -> tuple[torch.Tensor, dict[str, Any] | None]:
    """The final latents and the report of the errors, from texts of one seed; loads models if no pipeline is given."""
    pipeline = pipeline or loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
    torch.manual_seed(3)
    residuals = ResidualCache(plan.skips)
    latents = pipeline.latent(plan, *blank_inputs(plan, files), Stopwatch("cpu"), lambda *_: None, residuals)
    assert pipeline.lossy is not None and getattr(pipeline.lossy, "_lists", {}) == {}  # the VAE gets their memory
    return latents.clone(), pipeline.lossy.report()


def test_all_blocks_give_the_latents_of_dense_attention(planned: Planned) -> None:
    """The order of the tokens, the lists and the ragged end together; only sums round otherwise."""
    plan, files = planned(attention="math")
    dense = final_latents(plan, files, Ranks("cpu"))
    sparse = [planned(attention="sparse", density=density, **NO_GUARDS)[0] for density in (1.0, 0.5)]
    whole, half = latents_of(sparse, files, Ranks("cpu"))
    assert relative_error(whole, dense) <= 1e-5
    assert 1e-3 < relative_error(half, dense) < 1


def test_a_last_image_s_blocks_are_in_all_lists(
    small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last frame has 91 of 455 tokens, which lie in two blocks. All four blocks together are dense attention."""

    def planned(**options: Any) -> tuple[Plan, ModelFiles]:
        return plan_small_model(small_model, **SIZE, fit="crop", **options)

    dense = final_latents(*planned(attention="math", last_image="cat.png"), Ranks("cpu"))
    kept: list[Any] = []
    make, order = sparse_attention.block_lists, sparse_attention.brick_order
    monkeypatch.setattr(sparse_attention, "block_lists", lambda *a: kept.append(a[4:]) or make(*a))
    monkeypatch.setattr(sparse_attention, "brick_order", lambda *a, **k: kept.append(k) or order(*a, **k))
    whole = planned(**HALF, **NO_GUARDS, last_image="cat.png")
    assert relative_error(final_latents(*whole, Ranks("cpu")), dense) <= 1e-5
    assert kept[0] == {"has_last": True} and {*kept[1:]} == {(1, 2)}
    kept.clear()
    final_latents(*planned(**HALF, **NO_GUARDS), Ranks("cpu"))
    assert kept[0] == {"has_last": False} and {*kept[1:]} == {(1, 0)}


@pytest.mark.parametrize(
    ("mesh", "fsdp"), [(Mesh(ulysses=4), "off"), (Mesh(cfg=2, ulysses=2), "on")], ids=["ulysses4", "cfg2-sharded"]
)
def test_every_mesh_gives_the_latents_and_errors_of_one_rank(planned: Planned, mesh: Mesh, fsdp: str) -> None:
    """With a gate of guidance, both halves of parallel guidance run the last steps alike."""
    plan, files = planned(**HALF, attention_check=True, guidance_gate=0.5, dense_layers=0)
    expected, report = made(plan, files, Ranks("cpu"))
    assert report is not None and len(report["forwards"]) > 3
    plan = with_options(plan, dit_fsdp=fsdp, t5_fsdp=fsdp)
    for latents, of_rank in on_ranks(mesh, lambda ranks: made(plan, files, ranks)):
        assert relative_error(latents, expected) <= 1e-5
        assert of_rank is not None and of_rank["largest_at"] == report["largest_at"]
        for forward, own in zip(report["forwards"], of_rank["forwards"], strict=True):
            assert (own["step"], own["branch"]) == (forward["step"], forward["branch"])
            for errors, own_errors in zip(forward["relative_errors"], own["relative_errors"], strict=True):
                assert own_errors == pytest.approx(errors, rel=2e-2)  # they are written with three digits


def varied(plan: Plan, *by_band: Any, bands: tuple[int, ...] = (0,)) -> Plan:
    """Returns the plan with densities of its eight heads, by band and layer."""
    return dataclasses.replace(plan, densities=Densities(bands=bands, by_band=by_band))


def test_a_uniform_plan_gives_the_bits_of_its_density(planned: Planned) -> None:
    plan, files = planned(**HALF, attention_check=True)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    expected, report = made(plan, files, Ranks("cpu"), pipeline)
    uniform, of_uniform = made(varied(plan, ((0.5,) * 8,) * 2), files, Ranks("cpu"), pipeline)
    assert torch.equal(uniform, expected) and of_uniform == report
    one_denser = ((0.5,) * 8, (0.5,) * 7 + (None,))
    assert not torch.equal(made(varied(plan, one_denser), files, Ranks("cpu"), pipeline)[0], expected)


def test_ranks_give_each_head_its_density(planned: Planned) -> None:
    """Each head has its own density, a layer is dense, and the ranks regroup after the gate of guidance."""
    plan, files = planned(**HALF, attention_check=True, guidance_gate=0.5, **NO_GUARDS)
    rising = (None, *(0.3 + 0.1 * head for head in range(7)))
    plan = varied(plan, ((None,) * 8, rising), (rising[::-1], (0.5,) * 8), bands=(0, 2))
    expected, report = made(plan, files, Ranks("cpu"))
    assert report is not None
    first = report["forwards"][0]["relative_errors"]
    assert first[0] is None and first[1][0] < 1e-5 < 1e-2 < first[1][1]  # the dense head listed all blocks
    plan = with_options(plan, dit_fsdp="on", t5_fsdp="on", cfg_parallel=2, ulysses=2)
    assert plan.regroups
    for latents, of_rank in on_ranks(Mesh(cfg=2, ulysses=2), lambda ranks: made(plan, files, ranks)):
        assert relative_error(latents, expected) <= 1e-5
        assert of_rank is not None and of_rank["largest_at"] == report["largest_at"]


@torch.inference_mode()
@pytest.mark.parametrize(
    "weights",
    [
        pytest.param({}, id="fp32", marks=pytest.mark.long),
        pytest.param({"precision": "bf16", "quantize": "fp8-rowwise", "quantize_on_the_fly": True}, id="fp8-rowwise"),
    ],
)
def test_heads_that_are_divided_by_their_work_give_the_bits_of_their_own_order(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any]
) -> None:
    """In the first two steps, guidance is parallel and two ranks share the heads; then four ranks do."""
    plan, files = planned(**HALF, attention_check=True, guidance_gate=0.5, **NO_GUARDS, **weights)
    rising = (None, "fp8", *(0.4 + 0.1 * head for head in range(6)))
    plan = with_options(varied(plan, (rising, rising[::-1])), cfg_parallel=2, ulysses=2)
    assert plan.regroups and plan.sparsity is not None
    lengths = plan.sparsity.listed(0, 0)
    assert lengths == (4, 0, 2, 2, 3, 3, 4, 4) and plan.sparsity.assigned(lengths, 4) == (
        (0, 5),
        (2, 6),
        (3, 7),
        (1, 4),
    )
    used: list[Any] = []
    grouped = HeadOrder.grouped
    monkeypatch.setattr(
        HeadOrder, "grouped", lambda self, x, n: used.append(self.order.tolist()) or grouped(self, x, n)
    )

    def both(ranks: Ranks) -> Any:
        pipeline = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
        divided = made(plan, files, ranks, pipeline)
        orders, used[:] = [*used], []
        monkeypatch.setattr(sparsity, "assigned", in_order)
        return divided, made(plan, files, ranks, pipeline), orders, [*used]

    for divided, own, orders, none in on_ranks(Mesh(cfg=2, ulysses=2), both):
        assert torch.equal(divided[0], own[0]) and divided[1] == own[1] and none == []
        assert {tuple(order) for order in orders[-4:]} == {(0, 5, 2, 6, 3, 7, 1, 4), (0, 6, 1, 4, 5, 7, 2, 3)}


def in_order(lengths: tuple[int, ...], ranks: int) -> tuple[tuple[int, ...], ...]:
    heads, share = range(len(lengths)), len(lengths) // ranks
    return tuple(tuple(heads[first : first + share]) for first in heads[::share])


def test_a_plan_has_heads_in_float8(planned: Planned) -> None:
    """A layer has only such heads in its first band; in the other layer, two of eight are dense, three have lists."""
    plan, files = planned(**HALF, attention_check=True, guidance_gate=0.5, **NO_GUARDS)
    mixed = ("fp8", 0.5, None, "fp8", 0.75, None, "fp8", 0.5)
    plan = varied(plan, (("fp8",) * 8, mixed), (mixed[::-1], (0.5,) * 8), bands=(0, 2))
    assert plan.sparsity is not None and plan.sparsity.has_fp8 and plan.sparsity.listed(0, 0) == (0,) * 8
    expected, report = made(plan, files, Ranks("cpu"))
    assert report is not None
    all_fp8, errors = report["forwards"][0]["relative_errors"]
    assert all(1e-3 < error < 0.02 for error in all_fp8)
    for choice, error in zip(mixed, errors, strict=True):
        low, high = {"fp8": (1e-3, 0.02), None: (0, 1e-5)}.get(choice, (0.02, 1.5))  # type: ignore[call-overload]
        assert low <= error < high, (choice, error)
    plan = with_options(plan, dit_fsdp="on", t5_fsdp="on", cfg_parallel=2, ulysses=2)
    for latents, of_rank in on_ranks(Mesh(cfg=2, ulysses=2), lambda ranks: made(plan, files, ranks)):
        assert relative_error(latents, expected) <= 1e-3  # a value may round to another number of float8
        assert of_rank is not None
        for one, other in zip(report["forwards"], of_rank["forwards"], strict=True):
            for own, theirs in zip(one["relative_errors"], other["relative_errors"], strict=True):
                assert theirs == pytest.approx(own, rel=0.1, abs=1e-5)


def test_ranks_without_the_kernel_of_float8_refuse_its_plan(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = planned(**HALF)
    found = varied(plan, (("fp8",) * 8,) * 2).densities
    monkeypatch.setattr(session, "densities_of", lambda config, files: found)
    opened = session.Session.open(plan.config, Ranks("cpu"))
    assert opened.plan(plan.job())[0].sparsity is not None
    monkeypatch.setattr(attention_probe, "runs_fp8", lambda *a: False)
    with pytest.raises(ConfigError, match="--attention-plan: heads in float8 need the kernel fa3-fp8"):
        opened.plan(plan.job())
    monkeypatch.setattr(session, "densities_of", lambda config, files: None)
    opened.plan(plan.job())


def test_a_plan_runs_beside_magcache_and_quantized_experts(planned: Planned) -> None:
    """Its bands are the experts' steps, so that lists are made as without a plan, and all bits are equal."""
    weights = {"precision": "bf16", "quantize": "int8-weight-only", "quantize_on_the_fly": True}
    plan, files = planned(steps=8, **HALF, **weights)
    plan = skipping(plan)
    assert plan.skips == APART
    half = ((0.5,) * 8,) * 2
    by_band = (half, (half[0], (None,) * 8))
    plans = [plan, *(varied(plan, half, second, bands=(0, 3)) for second in by_band)]
    expected, uniform, other = latents_of(plans, files, Ranks("cpu"))
    assert torch.equal(uniform, expected)
    assert not torch.equal(other, expected)


def test_another_band_makes_other_lists(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps 3 to 7 are one expert's, and step 5 begins a band in which the second layer is dense."""
    plan, files = planned(steps=8, **HALF, lists_every=9)
    half = (0.5,) * 8
    lists, sparse = calls(monkeypatch, varied(plan, (half, half), (half, (None,) * 8), bands=(0, 5)), files)
    assert sparse == [(step, branch, 1) for step in (2, 3, 4) for branch in BRANCHES]
    assert lists == [(step, branch, 1) for step in (2, 3) for branch in BRANCHES]
    lists, _ = calls(monkeypatch, varied(plan, (half, half), (half, half), bands=(0, 5)), files)
    assert lists == [(step, branch, 1) for step in (2, 3, 5) for branch in BRANCHES]


def calls(monkeypatch: pytest.MonkeyPatch, plan: Plan, files: ModelFiles) -> tuple[list[Any], list[Any]]:
    """(step, branch, layer) of each making of lists, and of each sparse call."""
    lists, sparse = [], []
    make, attend = sparse_attention.block_lists, sparse_attention.SparseAttention.attend
    here: list[Any] = []

    def attending(self: Any, *qkv: torch.Tensor) -> torch.Tensor:
        here[:] = [(self._forward.step, self._forward.branch, self._layer)]
        return attend(self, *qkv)

    monkeypatch.setattr(sparse_attention.SparseAttention, "attend", attending)
    monkeypatch.setattr(sparse_attention, "block_lists", lambda *a: lists.append(*here) or make(*a))
    run = sparse_attention.listed_attention
    monkeypatch.setattr(sparse_attention, "listed_attention", lambda *a: sparse.append(*here) or run(*a))
    made(plan, files, Ranks("cpu"))
    return lists, sparse


def test_guards_are_dense_and_lists_are_made_again(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight steps, the first two are dense and the low-noise expert's begin with the fourth."""
    plan, files = planned(steps=8, **HALF, lists_every=3)
    assert plan.experts.index("low_noise") == 3
    lists, sparse = calls(monkeypatch, plan, files)
    assert sparse == [(step, branch, 1) for step in range(2, 8) for branch in BRANCHES]
    assert lists == [(step, branch, 1) for step in (2, 3, 6) for branch in BRANCHES]


@torch.inference_mode()
def test_a_cancelled_video_leaves_no_lists(planned: Planned) -> None:
    """The next video encodes its image before its own lists replace them, and the VAE's memory plan has no lists."""
    plan, files = planned(**HALF, **NO_GUARDS)
    pipeline = loading.load_models(files, plan.config, Ranks("cpu"), Stopwatch("cpu"))
    assert isinstance(pipeline.lossy, SparseAttention)
    held: list[int] = []

    def cancelling(done: int, expert: str) -> None:
        held.append(len(pipeline.lossy._lists))  # type: ignore[union-attr]
        if done == 1:
            raise CancelledError("cancelled")

    with pytest.raises(CancelledError):
        pipeline.latent(plan, *blank_inputs(plan, files), Stopwatch("cpu"), cancelling, ResidualCache(plan.skips))
    assert held[-1] == 4 and pipeline.lossy._lists == {}  # of two branches and two layers


Errors = dict[tuple[int, Branch, int], list[Any]]
LENGTHS = (2, 3, 4)  # of lists of four blocks


@torch.inference_mode()
def ladder(plan: Plan, files: ModelFiles, ranks: Ranks) -> tuple[torch.Tensor, Errors]:
    """The final latents of a calibration, and the errors of lists of three lengths."""
    torch.manual_seed(3)
    pipeline = loading.load_models(files, plan.config, ranks, Stopwatch("cpu"))
    assert isinstance(pipeline.lossy, SparseAttention)
    pipeline.lossy.measure(LENGTHS, fp8=True)
    latents = pipeline.latent(
        plan, *blank_inputs(plan, files), Stopwatch("cpu"), lambda *_: None, ResidualCache(plan.skips)
    )
    return latents.clone(), pipeline.lossy.errors()


def test_a_calibration_stays_dense_and_measures_what_lists_would_cost(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first layer, the first step of a sparse video has the input of the calibration's, and the same error."""
    plan, files = planned(steps=8, attention="sparse", density=1.0, attention_check=True, lists_every=2, **NO_GUARDS)
    chosen: list[int] = []
    order = sparse_attention.block_order
    monkeypatch.setattr(sparse_attention, "block_order", lambda *a: chosen.append(1) or order(*a))
    latents, errors = ladder(plan, files, Ranks("cpu"))
    assert relative_error(latents, made(plan, files, Ranks("cpu"))[0]) <= 1e-5  # lists of all blocks are dense
    assert {*errors} == {(step, branch, layer) for step in range(8) for branch in BRANCHES for layer in (0, 1)}
    assert len(chosen) == 5 * 2 * 2  # in the steps 0, 2, 3, 5 and 7, as a video's lists are; two branches and layers
    half, _ = planned(steps=2, **HALF, attention_check=True, **NO_GUARDS)  # its first step is that of eight
    pipeline = loading.load_models(files, half.config, Ranks("cpu"), Stopwatch("cpu"))
    _, report = made(half, files, Ranks("cpu"), pipeline)
    assert report is not None
    by_length = list(zip(*errors[0, "prompt", 0], strict=True))
    assert report["forwards"][0]["relative_errors"][0] == pytest.approx(by_length[0], rel=1e-2)
    assert min(by_length[0]) > 1e-2 > 1e-5 > max(by_length[2])
    _, report = made(varied(half, (("fp8",) * 8,) * 2), files, Ranks("cpu"), pipeline)
    assert report is not None
    assert report["forwards"][0]["relative_errors"][0] == pytest.approx(by_length[3], rel=0.15)  # other limits of q
    assert min(by_length[3]) > 1e-3 and max(by_length[3]) < min(by_length[0])


def test_ranks_measure_the_errors_of_one_rank(planned: Planned) -> None:
    plan, files = planned(attention="sparse", density=1.0, attention_check=True, guidance_gate=0.5, **NO_GUARDS)
    _, expected = ladder(plan, files, Ranks("cpu"))
    plan = with_options(plan, dit_fsdp="on", t5_fsdp="on", cfg_parallel=2, ulysses=2)
    for _, errors in on_ranks(Mesh(cfg=2, ulysses=2), lambda ranks: ladder(plan, files, ranks)):
        assert errors.keys() == expected.keys()
        for key, heads in expected.items():
            assert torch.allclose(torch.tensor(errors[key]), torch.tensor(heads), rtol=1e-3, atol=1e-5)


def test_skipped_forwards_make_no_lists(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that would be made in a step that MagCache skips are made in the next one that runs."""
    plan, files = planned(steps=8, **HALF, **NO_GUARDS, lists_every=2)
    plan = skipping(plan)
    assert plan.skips == APART
    lists, sparse = calls(monkeypatch, plan, files)
    ran = [
        (step, branch) for step in range(8) for branch, skips in zip(BRANCHES, APART[step], strict=True) if not skips
    ]
    assert sparse == [(*forward, layer) for forward in ran for layer in (0, 1)]
    made_at = {branch: [step for step, of, layer in lists if (of, layer) == (branch, 0)] for branch in BRANCHES}
    assert made_at == {"prompt": [0, 3, 6], "negative_prompt": [0, 3, 5, 7]}


def test_only_sparse_attention_changes_the_order_of_tokens(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[TokenOrder] = []
    forward = WanDiT.forward
    monkeypatch.setattr(WanDiT, "forward", lambda self, *a, **k: orders.append(k["order"]) or forward(self, *a, **k))
    plan, files = planned(**HALF)
    final_latents(plan, files, Ranks("cpu"))
    bricks = brick_order(plan.geometry.token_grid, (2, 8, 8)).order
    assert bricks is not None and not torch.equal(bricks, torch.arange(455))
    assert len(orders) == 8 and all(torch.equal(order.order, bricks) for order in orders)
    orders.clear()
    final_latents(*planned(attention="math"), Ranks("cpu"))
    assert orders == [RASTER] * 8


def test_quantized_experts_may_be_sparse(planned: Planned) -> None:
    """All blocks are computed, so that the latents are those of dense attention with the same weights."""
    weights = {"precision": "bf16", "quantize": "int8-weight-only", "quantize_on_the_fly": True}
    plan, files = planned(attention="math", **weights)
    dense = final_latents(plan, files, Ranks("cpu"))
    whole, _ = planned(attention="sparse", density=1.0, **NO_GUARDS, **weights)
    assert relative_error(final_latents(whole, files, Ranks("cpu")), dense) <= 2e-2


def test_residuals_stay_in_the_order_of_the_tokens(planned: Planned) -> None:
    """All blocks are computed, so that MagCache beside it gives what it gives alone."""
    plan, files = planned(steps=8, attention="math")
    alone = final_latents(skipping(plan), files, Ranks("cpu"))
    both, _ = planned(steps=8, attention="sparse", density=1.0, **NO_GUARDS)
    assert relative_error(final_latents(skipping(both), files, Ranks("cpu")), alone) <= 1e-5


def test_the_queries_are_drawn_again_in_each_call_and_by_the_seed(planned: Planned) -> None:
    plan, _ = planned(**HALF, attention_check=True)
    other = with_options(plan, seed=8)
    drawn = set()
    for seeded in (plan, other, plan):
        sparse = sparse_attention.SparseAttention(lambda q, k, v: v, 8, Ranks("cpu"))
        sparse.start(seeded)
        for step, branch, layer in ((2, "prompt", 1), (3, "prompt", 1), (2, "negative_prompt", 1), (2, "prompt", 0)):
            sparse.begin(step, "high_noise", BRANCHES, branch, Ranks("cpu"))  # type: ignore[arg-type]
            assert sparse._forward is not None
            rows = sparse._rows(layer, 455)
            assert rows.shape == (8, 64) and int(rows.min()) >= 0 and int(rows.max()) < 455
            assert len({tuple(row) for row in rows.tolist()}) == 8
            drawn.add(tuple(rows.flatten().tolist()))
    assert len(drawn) == 8  # the third video draws what the first one drew


def test_errors_are_not_measured_unless_asked(planned: Planned) -> None:
    plan, files = planned(**HALF)
    assert made(plan, files, Ranks("cpu"))[1] is None


def test_the_report_says_where_the_largest_error_is() -> None:
    found = {(2, "prompt", 1): [0.1, 0.25], (2, "negative_prompt", 1): [0.3, 0.12345]}
    report = lossy_attention._report(found, 2)  # type: ignore[arg-type]
    assert report["largest"] == 0.3 and report["mean"] == 0.193
    assert report["largest_at"] == {"step": 2, "branch": "negative_prompt", "layer": 1, "head": 0}
    assert report["forwards"] == [
        {"step": 2, "branch": "prompt", "relative_errors": [None, [0.1, 0.25]]},
        {"step": 2, "branch": "negative_prompt", "relative_errors": [None, [0.3, 0.123]]},
    ]
    assert lossy_attention._report({}, 2)["largest_at"] is None


def test_auto_never_takes_a_lossy_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sparse" not in attention_kernels.KERNELS
    choice = choose("sparse", "cpu", torch.float32, 24)
    assert (choice.kernel, choice.dense) == ("sparse", "flash")
    assert choose("auto", "cpu", torch.float32, 24).dense is None
    assert "relative error" in choice.why and "exact calls by flash" in choice.why
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--attention sparse: flash-attn-4 is not installed: run `pip install"):
        choose("sparse", "cuda", torch.float32, 24)
    wrong = attention_probe._LOSSY["sparse"]._replace(run=lambda q, k, v: v)
    monkeypatch.setitem(attention_probe._LOSSY, "sparse", wrong)
    with pytest.raises(ConfigError, match=r"--attention sparse: fails \(the kernel's result is wrong"):
        choose("sparse", "cpu", torch.float32, 24)
    monkeypatch.undo()
    for name in ("flash", "math"):
        monkeypatch.setitem(attention_kernels.KERNELS, name, attention_kernels.Kernel(lambda q, k, v: v))
    with pytest.raises(ConfigError, match="--attention auto: none of flash, math works"):
        choose("sparse", "cpu", torch.float32, 24)
