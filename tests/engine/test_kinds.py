"""Tests the kinds of videos beside one that starts from an image: on meshes, sharded, with skips, in 8 bits, compiled.

Each kind goes through what `test_rank_groups` and `test_magcache_loop` test for a video that starts from an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.compiling import compiler
from tests.engine.test_magcache_loop import skipping
from tests.engine.test_rank_groups import final_latents, shown, with_options
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import plan_small_model
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import loading
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.model_files import ModelFiles

Planned = tuple[Plan, ModelFiles]
ALL, SKIPS = "all forwards", "joint skips"


def with_last_image(request: pytest.FixtureRequest) -> Planned:
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save("last.png")
    return plan_small_model(request.getfixturevalue("small_model"), last_image="last.png", steps=8)


def from_text(request: pytest.FixtureRequest) -> Planned:
    plan, files = plan_small_model(request.getfixturevalue("small_text_model"), steps=8, shift=5.0)
    assert not plan.config.video.images and plan.geometry.tokens == 48  # 96x64, exactly
    return plan, files


KINDS: dict[str, Callable[[pytest.FixtureRequest], Planned]] = {
    "first and last image": with_last_image,
    "text alone": from_text,
}


@pytest.fixture(params=KINDS)
def planned(request: pytest.FixtureRequest, workdir: Path) -> Planned:
    """Returns a plan of eight steps, several of each expert, with unequal guidance."""
    plan, files = KINDS[request.param](request)
    assert all(len(steps) > 2 for steps in plan.timesteps.values()) and len(plan.schedule) == 8
    return plan, files


@pytest.mark.parametrize(  # every two of: a mesh, whole or sharded weights, all or fewer forwards. Long: larger meshes
    ("mesh", "ways"),
    [
        (Mesh(cfg=2, ulysses=2), [("on", ALL), ("off", SKIPS)]),
        (Mesh(ulysses=2), [("on", SKIPS), ("off", ALL)]),
        pytest.param(Mesh(cfg=2, ulysses=2), [("on", SKIPS), ("off", ALL)], marks=pytest.mark.long),
        pytest.param(Mesh(ulysses=4), [("on", SKIPS), ("off", SKIPS)], marks=pytest.mark.long),
        pytest.param(Mesh(cfg=2, ulysses=4), [("on", SKIPS), ("off", ALL)], marks=pytest.mark.long),
    ],
    ids=shown,
)
def test_every_mesh_gives_the_latents_of_one_rank(planned: Planned, mesh: Mesh, ways: list[tuple[str, str]]) -> None:
    plan, files = planned
    whole = {ALL: plan, SKIPS: skipping(plan, magcache_joint="on")}
    expected = {name: final_latents(each, files, Ranks("cpu")) for name, each in whole.items()}
    assert relative_error(expected[ALL], expected[SKIPS]) > 1e-4
    of_mesh = {"cfg_parallel": mesh.cfg, "ulysses": mesh.ulysses}
    plans = [
        with_options(whole[name], dit_fsdp=fsdp, t5_fsdp=fsdp, artifacts_dir=f"artifacts-{fsdp}", **of_mesh)
        for fsdp, name in ways
    ]
    results = on_ranks(mesh, lambda ranks: [final_latents(each, files, ranks) for each in plans])
    for (fsdp, name), *got in zip(ways, *results, strict=True):
        error = max(relative_error(latents, expected[name]) for latents in got)
        print(f"{shown(mesh)}, FSDP {fsdp}, {name}: relative error of the final latents {error:.1e}")
        assert error <= 1e-5
        assert all(torch.equal(latents, got[0]) for latents in got)


@pytest.mark.parametrize("scheme", ["fp8-rowwise", "int8-dynamic", "int8-weight-only"])
def test_experts_in_8_bits_give_the_same_on_two_ranks(planned: Planned, scheme: str) -> None:
    plan, files = planned
    bf16 = with_options(plan, precision="bf16")
    plan = skipping(bf16, quantize=scheme, quantize_on_the_fly=True)
    expected = final_latents(plan, files, Ranks("cpu"))
    assert 0 < relative_error(expected, final_latents(skipping(bf16), files, Ranks("cpu"))) < 0.2
    for latents in on_ranks(Mesh(cfg=2), lambda ranks: final_latents(plan, files, ranks)):
        assert torch.equal(latents, expected)


@torch.inference_mode()
@pytest.mark.parametrize("mesh", [Mesh(), pytest.param(Mesh(ulysses=2), marks=pytest.mark.long)], ids=shown)
def test_compiled_blocks_stay_one_graph(planned: Planned, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned
    plan = skipping(plan)
    expected = final_latents(plan, files, Ranks("cpu"))
    compiler(monkeypatch, loading)
    plan = with_options(plan, compile=True)

    def work(ranks: Ranks) -> torch.Tensor:
        with torch._dynamo.config.patch(error_on_recompile=True):
            return final_latents(plan, files, ranks)

    for got in on_ranks(mesh, work) if mesh.group_size > 1 else [work(Ranks("cpu"))]:
        assert relative_error(got, expected) <= (1e-5 if mesh.group_size > 1 else 1e-6)
