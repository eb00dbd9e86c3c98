"""Tests the mesh, and Ulysses on real processes over gloo: every rank's velocity equals that of one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.compiling import compile_before
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.runtime.distributed import fsdp
from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.distributed.ulysses import Ulysses
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.mesh import Mesh, choose_mesh
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.attention import Sequence, WholeSequence
from wanfast.runtime.models.bricks import RASTER, brick_order
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables

SPEC = DiTSpec(dim=160, ffn_dim=200, num_heads=8, num_layers=2, freq_dim=64, text_dim=40, text_len=16)


def velocity(sequence: Sequence, grid: tuple[int, int, int], brick: tuple[int, int, int] | None = None) -> torch.Tensor:
    model = WanDiT(SPEC, torch.float32, sequence)
    randomise(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    latent, condition = (torch.randn(1, c, *grid, generator=generator) for c in (16, 20))
    text = model.encode_text(torch.randn(1, 7, SPEC.text_dim, generator=generator))
    T, h, w = grid
    token_grid = (T, h // 2, w // 2)
    rope, order = rotary_tables(token_grid, SPEC.head_dim), brick_order(token_grid, brick) if brick else RASTER
    out: torch.Tensor = model(latent, condition, torch.tensor([617]), text, rope, order=order)[0]
    return out


@pytest.mark.parametrize("grid", [(2, 4, 8), (3, 6, 6), (1, 2, 6)], ids=["16 tokens", "27 tokens", "3 tokens"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_equals_one_rank(ranks: int, grid: tuple[int, int, int]) -> None:
    with torch.no_grad():
        expected = velocity(WholeSequence(), grid)
    for rank, got in enumerate(on_ranks(Mesh(ulysses=ranks), lambda own: velocity(own.sequence, grid))):
        error = relative_error(got, expected)
        print(f"ulysses {ranks}, {grid}, rank {rank}: relative error {error:.1e}")
        assert error <= 1e-5


@pytest.mark.parametrize("grid", [(3, 6, 6), (4, 6, 10)], ids=["27 tokens", "60 tokens"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_in_bricks_give_the_same_velocity(ranks: int, grid: tuple[int, int, int]) -> None:
    """Only the order of sums differs; tables or tokens in another order would change the velocity."""
    brick = (2, 2, 2)
    with torch.no_grad():
        expected = velocity(WholeSequence(), grid)
        found = on_ranks(Mesh(ulysses=ranks), lambda own: velocity(own.sequence, grid, brick))
    for got in found:
        assert relative_error(got, expected) <= 1e-5


def test_padded_keys_are_not_attended_to() -> None:
    """27 tokens on 4 ranks need one padding token; attending to it would change the result by 100 times the bound."""
    grid = (3, 6, 6)

    def attending_to_padding(ranks: Ranks) -> torch.Tensor:
        class Careless(Ulysses):
            def attention(self, projections, num_tokens, attend):
                return super().attention(projections, num_tokens + 1, attend)

        return velocity(Careless(dist.group.WORLD), grid)

    with torch.no_grad():
        expected = velocity(WholeSequence(), grid)
    assert relative_error(on_ranks(Mesh(ulysses=4), attending_to_padding)[0], expected) > 1e-3


def test_a_block_stays_one_graph_under_ulysses() -> None:
    grid = (2, 4, 8)

    def compiled(ranks: Ranks) -> torch.Tensor:
        torch._dynamo.reset()  # a forked rank inherits what another test compiled
        compile_block = torch.compile
        from wanfast.runtime.models import dit

        forward = dit.Block.forward
        dit.Block.forward = compile_block(forward, fullgraph=True, dynamic=False, backend="eager")
        torch._dynamo.config.error_on_recompile = True
        try:
            with torch.no_grad():
                return velocity(ranks.sequence, grid)
        finally:
            dit.Block.forward = forward

    with torch.no_grad():
        expected = velocity(WholeSequence(), grid)
    compile_before()
    assert relative_error(on_ranks(Mesh(ulysses=2), compiled)[1], expected) <= 1e-5


def test_a_compiled_block_waits_for_an_exchange_only_where_it_needs_the_result() -> None:
    """A product is computed during each exchange except the last; torch's functional exchange would wait at once."""
    kinds = {"all_to_all_single": "send", "wait_tensor": "wait", "linear": "project"}

    def order(ranks: Ranks) -> list[str]:
        torch._dynamo.reset()
        found: list[str] = []

        def record(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            names = [str(node.target) for node in graph.graph.nodes]
            found.extend(kind for name in names for key, kind in kinds.items() if key in name)
            return graph.forward

        with torch.device("meta"):
            model = WanDiT(SPEC, torch.float32, ranks.sequence)
        randomise(model.to_empty(device="cpu"), seed=0)
        attend = torch.compile(model.blocks[0].self_attn, fullgraph=True, backend=record)
        rope = rotary_tables((2, 2, 2), SPEC.head_dim, "cpu")
        with torch.no_grad():
            own = ranks.sequence
            attend(torch.randn(1, 4, SPEC.dim), type(rope)(*(own.shard(table, 0) for table in rope)), 8, own)
        return found

    expected = ["project", "send"] * 3 + ["project"] + ["wait"] * 3 + ["send", "wait", "project"]
    compile_before()
    assert on_ranks(Mesh(ulysses=2), order) == [expected] * 2


def test_each_block_is_gathered_by_itself() -> None:
    def units(ranks: Ranks) -> list[str]:
        with torch.device("meta"):
            model = WanDiT(SPEC, torch.float32)
        fsdp.shard(model, "cpu")
        return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]

    assert on_ranks(Mesh(ulysses=2), units) == [["", "blocks.0", "blocks.1"]] * 2


@pytest.mark.parametrize(
    ("ranks", "heads", "options", "expected"),
    [
        (1, 40, {}, Mesh()),
        (2, 40, {}, Mesh(cfg=2)),
        (8, 40, {}, Mesh(cfg=2, ulysses=4)),
        (16, 40, {}, Mesh(cfg=2, ulysses=8)),
        (8, 40, {"cfg_parallel": 1}, Mesh(ulysses=8)),
        (8, 40, {"ulysses": 2}, Mesh(replica=2, cfg=2, ulysses=2)),
        (8, 40, {"guided": False}, Mesh(ulysses=8)),
        (6, 40, {}, Mesh(replica=3, cfg=2)),
        (8, 40, {"nnodes": 2}, Mesh(cfg=2, ulysses=8)),
        (4, 40, {"nnodes": 2, "cfg_parallel": 1}, Mesh(ulysses=8)),
        (8, 2, {}, Mesh(replica=2, cfg=2, ulysses=2)),
    ],
)
def test_the_mesh_of_a_world_size(ranks: int, heads: int, options: dict[str, object], expected: Mesh) -> None:
    mesh = choose_mesh(ranks, heads, **({"guided": True} | options))
    assert mesh == expected
    assert mesh.size == ranks * options.get("nnodes", 1)


def test_a_mesh_that_does_not_fit_lists_what_does() -> None:
    with pytest.raises(ConfigError) as error:
        choose_mesh(8, 40, guided=True, ulysses=3)
    assert "--ulysses 3 does not fit 8 ranks and 40 attention heads" in str(error.value)
    assert "--cfg-parallel 2 --ulysses 4" in str(error.value)


def test_several_machines_make_one_video_and_never_several() -> None:
    with pytest.raises(ConfigError, match=r"--ulysses 4 does not fit 16 ranks of 2 machines .* --ulysses 8$"):
        choose_mesh(8, 40, nnodes=2, ulysses=4)
    with pytest.raises(
        ConfigError, match="--nnodes 2 --num-gpus 3: 40 attention heads cannot be shared by 6 ranks: use"
    ):
        choose_mesh(3, 40, nnodes=2)


def test_without_guidance_no_mesh_of_its_branches_is_listed() -> None:
    words = r"--ulysses auto without guidance does not fit .*: use one of: (--cfg-parallel 1 --ulysses \d(, )?)+$"
    with pytest.raises(ConfigError, match=words):
        choose_mesh(8, 40, guided=False, cfg_parallel=2)


@pytest.mark.parametrize("recorded", [True, False])
def test_ranks_free_cuda_graphs_before_they_part(monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    events: list[str] = []
    for owner, name in (
        (dist, "init_process_group"),
        (dist, "new_subgroups_by_enumeration"),
        (dist, "get_rank"),
        (dist, "destroy_process_group"),
        (torch.compiler, "reset"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: events.append(name) or [None])
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", torch)
    if not recorded:
        monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees")
    with rank_group("cpu", Mesh(ulysses=2), 60):
        events.clear()
    assert events == ["reset"] * recorded + ["destroy_process_group"]


def test_ulysses_is_the_fastest_axis_of_a_rank_group() -> None:
    mesh = Mesh(replica=2, cfg=2, ulysses=4)
    assert mesh.neighbours("ulysses") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.neighbours("cfg") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_what_the_leader_has_goes_to_each_rank_once() -> None:
    """A picture of the leader must not be gathered from every rank."""

    def work(ranks: Ranks) -> tuple[object, str, int]:
        gathered = []
        gather = dist.all_gather_object
        dist.all_gather_object = lambda *args, **named: gathered.append(1) or gather(*args, **named)  # type: ignore[func-returns-value]
        shared = ranks.lead(lambda: {"rank": ranks.rank})

        def fail() -> None:
            raise MissingArtifactError(f"rank {ranks.rank} misses it")

        with pytest.raises(MissingArtifactError) as caught:
            ranks.lead(fail)
        return shared, f"{caught.value} {caught.value.is_agreed}", len(gathered)

    assert on_ranks(Mesh(ulysses=2), work) == [({"rank": 0}, "rank 0 misses it True", 0)] * 2
