"""Tests lossy attention in compiled blocks: what it computes, and that a change of it compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.compiling import compiler
from tests.engine.test_rank_groups import with_options
from tests.engine.test_sparse_attention import HALF, NO_GUARDS, SIZE, Planned, varied
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import blank_inputs, plan_small_model
from wanfast.commands.warmup import EVERY_CALL
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading, sparse_attention
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.jobs import warmup
from wanfast.runtime.models import lossy
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.model_files import ModelFiles

FP8_OF_TWO = {"attention": "fa3-fp8", "fp8_steps": "1:3"}
SMALL = {"size": "96x64", "frames": 5}  # 48 tokens


@pytest.fixture
def planned(small_text_model: Path, workdir: Path) -> Planned:
    """Returns a function that plans a video of 455 tokens with a small model, which has two layers."""
    return lambda **options: plan_small_model(small_text_model, **{**SIZE, **options})


@torch.inference_mode()
def videos(plans: list[Plan], files: ModelFiles, ranks: Ranks, counter: CompileCounterWithBackend | None = None) -> Any:
    """Returns the latents and errors of the plans' videos by one session, and how many graphs there are after each."""
    pipeline = loading.load_models(files, plans[0].config, ranks, Stopwatch("cpu"))
    made, graphs = [], []
    for plan in plans:
        torch.manual_seed(3)
        given = blank_inputs(plan, files)
        latents = pipeline.latent(plan, *given, Stopwatch("cpu"), lambda *_: None, plan.residuals())
        assert pipeline.lossy is not None and lossy._attend is lossy._check is None
        made.append((latents.clone(), pipeline.lossy.report()))
        graphs.append(counter.frame_count if counter else 0)
    return made, graphs


def in_many_ways(planned: Planned) -> tuple[list[Plan], ModelFiles]:
    """Plans of other densities, guards and bands; heads are dense, in float8 or have lists, and the check begins."""
    plan, files = planned(**HALF, guidance_gate=0.5)
    mixed = (None, None, 0.75, "fp8", 0.5, 0.5, 0.5, "fp8")  # two ranks do not get them in their own order
    plans = [
        plan,
        with_options(plan, density=0.75, dense_share=0.0, lists_every=1),
        varied(
            with_options(plan, attention_check=True, **NO_GUARDS),
            (mixed, mixed[::-1]),
            (mixed, (None,) * 8),
            bands=(0, 2),
        ),
    ]
    return plans, files


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(cfg=2)], ids=["1 rank", "2 ranks that regroup"])
def test_sparse_blocks_are_compiled_once(planned: Planned, monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    """One graph serves both experts and all plans, and each share of the tokens. All bits are equal."""
    plans, files = in_many_ways(planned)
    plans = [with_options(plan, cfg_parallel=mesh.cfg, ulysses=mesh.ulysses) for plan in plans]
    eager = on_ranks(mesh, lambda ranks: videos(plans, files, ranks))
    counter = compiler(monkeypatch, loading)
    plans = [with_options(plan, compile=True) for plan in plans]
    compiled = on_ranks(mesh, lambda ranks: videos(plans, files, ranks, counter))
    for (expected, _), (made, graphs) in zip(eager, compiled, strict=True):
        assert graphs == [2 if plans[0].regroups else 1] * 3
        for (latents, report), (wanted, wanted_report) in zip(made, expected, strict=True):
            assert torch.equal(latents, wanted) and report == wanted_report
    assert expected[2][1]["mean"] > 1e-3


@pytest.mark.slow
def test_float8_has_a_graph_beside_the_exact_one(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another schedule compiles nothing, and the check has a graph of its own. All bits are equal."""
    mesh = Mesh(ulysses=2)
    plan, files = planned(**FP8_OF_TWO, **SMALL, ulysses=2)
    plans = [plan, with_options(plan, fp8_steps="0:4", fp8_layers="1:2")]
    plans += [with_options(plans[1], attention_check=True)]
    eager = on_ranks(mesh, lambda ranks: videos(plans, files, ranks))
    counter = compiler(monkeypatch, loading)
    plans = [with_options(plan, compile=True) for plan in plans]
    compiled = on_ranks(mesh, lambda ranks: videos(plans, files, ranks, counter))
    for (expected, _), (made, graphs) in zip(eager, compiled, strict=True):
        assert graphs == [2, 2, 3]
        for (latents, report), (wanted, wanted_report) in zip(made, expected, strict=True):
            assert torch.equal(latents, wanted) and report == wanted_report
    assert expected[2][1]["mean"] > 1e-3


def warmed(plan: Plan, ranks: Ranks, counter: CompileCounterWithBackend) -> int:
    """Compiles what `wanfast warmup` does, and returns the number of graphs."""
    every_call = EVERY_CALL[plan.config.models.attention]
    with torch.inference_mode():
        warmup._forward(with_options(plan, **every_call, fp8_layers=None), ranks, Stopwatch("cpu"), "flash")
    assert lossy._attend is lossy._check is None
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options", "graphs"),
    [
        pytest.param(Mesh(cfg=2), {**HALF, "guidance_gate": 0.5}, 2, id="sparse, 2 ranks that regroup"),
        pytest.param(Mesh(), {**FP8_OF_TWO, **SMALL, "fp8_layers": "1:2", "attention_check": True}, 2, id="fp8"),
        pytest.param(Mesh(), {**HALF, "attention_check": True}, 1, id="sparse", marks=pytest.mark.long),
        pytest.param(
            Mesh(cfg=2),
            {**FP8_OF_TWO, **SMALL, "guidance_gate": 0.5},
            4,
            id="fp8, 2 ranks that regroup",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_run_compiles_nothing_after_a_warmup(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, options: dict[str, Any], graphs: int
) -> None:
    """Guards decide that two graphs are the same, and Inductor's cache has the same inputs then."""
    plan, files = planned(**options)
    plan = with_options(plan, cfg_parallel=mesh.cfg, ulysses=mesh.ulysses, compile=True)
    counter = compiler(monkeypatch, loading)
    monkeypatch.setattr(warmup, "compile_blocks", loading.compile_blocks)

    def both(ranks: Ranks) -> tuple[int, int]:
        after_warmup = warmed(plan, ranks, counter)
        return after_warmup, videos([plan], files, ranks, counter)[1][0]

    assert on_ranks(mesh, both) == [(graphs, graphs)] * mesh.cfg * mesh.ulysses


@torch.inference_mode()
def test_a_warmup_runs_each_kind_of_lossy_call(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds are numbers of heads in float8. The layer without them, and dense layers, are no kinds of their own."""
    eight = ("fp8",) * 8
    some, more = (*eight[:2], *(0.5,) * 6), (*eight[:5], None, 0.75, 0.5)
    plan, _ = planned(**HALF)
    plan = varied(with_options(plan, compile=True, **NO_GUARDS), (some, (None,) * 8), (some[::-1], more), bands=(0, 2))
    calls: list[Any] = []
    lists, in_fp8 = sparse_attention.block_lists, sparse_attention.attention_in_fp8
    monkeypatch.setattr(
        sparse_attention, "block_lists", lambda q, *a: calls.append(("lists", q.shape[2])) or lists(q, *a)
    )
    monkeypatch.setattr(
        sparse_attention, "attention_in_fp8", lambda q, *a: calls.append(("fp8", q.shape[2])) or in_fp8(q, *a)
    )
    warmed(plan, Ranks("cpu"), compiler(monkeypatch, warmup))
    assert calls == [("lists", 6), ("fp8", 2), ("lists", 3), ("fp8", 5)]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({**HALF, "dense_layers": 0}, 1e-5, id="sparse"),
        pytest.param({**FP8_OF_TWO, **SMALL}, 1e-3, id="fp8"),  # a value may round to another number of float8
    ],
)
def test_inductor_gives_what_eager_blocks_give(
    planned: Planned, workdir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], bound: float
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workdir / "inductor"))
    plan, files = planned(**options, attention_check=True)
    (((expected, report),), _) = videos([plan], files, Ranks("cpu"))
    torch._dynamo.reset()
    (((latents, compiled_report),), _) = videos([with_options(plan, compile=True)], files, Ranks("cpu"))
    assert list((workdir / "inductor").rglob("*.so"))  # it was compiled
    assert relative_error(latents, expected) <= bound
    assert report["mean"] > 1e-3 and compiled_report["mean"] == pytest.approx(report["mean"], rel=0.01)
