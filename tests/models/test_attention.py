"""Tests the attention kernels: each against the formula, the choice among them, and one graph per compiled block."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from tests.conftest import Machine, Outcome
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import CompileMode
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models import attention_kernels
from wanfast.runtime.models.attention import attention, attention_by
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables

Wanfast = Callable[..., Outcome]
SMALL = ("--size", "64x64", "--frames", "5", "--steps", "2", "--device", "cpu")
GOOD = ("generate", "--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--seed", "1", *SMALL)
SPEC = DiTSpec(dim=64, ffn_dim=80, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, text_len=16)


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4), (1, 300)], ids=str)
def test_kernels_equal_the_formula(kernel: str, lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = lengths
    q = torch.randn(2, queries, 3, 32, generator=generator)
    k, v = (torch.randn(2, keys, 3, 32, generator=generator) for _ in "kv")
    expected = attention_probe._formula(q.double(), k.double(), v.double())
    assert attention_by(kernel)(q, k, v).is_contiguous()  # the compiler assumes this
    for out in (attention_by(kernel)(q, k, v), attention(q, k, v)):
        assert relative_error(out, expected) <= 1e-6
        assert out.shape == q.shape


def velocity(model: WanDiT, frames: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latent, condition = (torch.randn(1, c, frames, 4, 8, generator=generator) for c in (16, 20))
    text = model.encode_text(torch.randn(1, 7, SPEC.text_dim, generator=generator))
    rope = rotary_tables((frames, 2, 4), SPEC.head_dim)
    out: torch.Tensor = model(latent, condition, torch.tensor([617]), text, rope)[0]
    return out


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Records the modes in which blocks are compiled, now without Inductor."""
    asked, compile_ = [], torch.nn.Module.compile

    def traced(module: torch.nn.Module, *, mode: str | None, **options: object) -> None:
        asked.append(mode)
        compile_(module, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    return asked


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=1)  # torch's own limit is 8, which takes nine sizes to pass
def test_blocks_are_compiled_for_one_shape_in_the_mode_that_is_asked_for(modes: list[str | None]) -> None:
    model = WanDiT(SPEC, torch.float32, attend=attention_by("math"))
    randomise(model, seed=1)
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, "max-autotune")
    assert modes == ["max-autotune"] * SPEC.num_layers
    compile_blocks(model, "default")
    assert modes[SPEC.num_layers :] == [None] * SPEC.num_layers
    for frames in range(1, 4):  # more recompilations than the limit above
        velocity(model, frames)
        velocity(model, frames)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@torch.no_grad()
@pytest.mark.parametrize(("mode", "marks"), [("max-autotune", 2), ("max-autotune-no-cudagraphs", 0), ("default", 0)])
def test_each_forward_is_one_step_of_cuda_graphs(
    modes: list[str | None], monkeypatch: pytest.MonkeyPatch, mode: CompileMode, marks: int
) -> None:
    marked: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    model = WanDiT(SPEC, torch.float32, attend=attention_by("math"))
    randomise(model, seed=1)
    compile_blocks(model, mode)
    for _ in range(2):
        velocity(model)
    assert len(marked) == marks


def test_rearrange_is_one_node_of_what_is_traced(modes: list[str | None]) -> None:
    """Inside it, Dynamo spent most of its time; the graph that the compiler gets is the same."""
    nodes: list[object] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compile_blocks(WanDiT(SPEC), "default")
    turned = torch.compile(lambda x: rearrange(x, "a b -> b a"), backend=record, fullgraph=True)
    assert torch.equal(turned(torch.eye(3, 4)), torch.eye(4, 3))
    assert nodes == [rearrange]


@torch.no_grad()
def test_a_break_in_a_block_is_an_error(modes: list[str | None]) -> None:
    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return attention(q, k, v)

    model = WanDiT(SPEC, torch.float32, attend=broken)
    randomise(model, seed=1)
    compile_blocks(model, "default")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        velocity(model)


@torch.no_grad()
def test_any_kernel_leaves_a_compiled_block_one_graph() -> None:
    models = [
        WanDiT(SPEC, torch.float32, attend=attend) for attend in (attention, *map(attention_by, ("flash", "math")))
    ]
    for model in models:
        randomise(model, seed=1)
    expected = velocity(models[0])
    for model in models[1:]:
        graphs = []

        def counting(graph: torch.fx.GraphModule, inputs: object, graphs: list[object] = graphs) -> object:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=counting)
        assert relative_error(velocity(model), expected) <= 1e-6
        assert len(graphs) == 1  # one graph for all three blocks
        called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert sum("wanfast.attention" in target for target in called) == 2  # self- and cross-attention


def test_auto_takes_the_first_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("cpu", torch.float32, 24)
    assert attention_probe.choose("auto", *arguments).kernel == "flash"
    kernels = attention_kernels.KERNELS
    wrong = dataclasses.replace(kernels["flash"], run=lambda q, k, v: v * 1.001)
    monkeypatch.setitem(kernels, "flash", wrong)
    choice = attention_probe.choose("auto", *arguments)
    assert choice.kernel == "math" and "flash fails" in choice.why
    with pytest.raises(ConfigError, match="--attention flash: fails"):
        attention_probe.choose("flash", *arguments)
    monkeypatch.setitem(kernels, "math", dataclasses.replace(kernels["math"], run=lambda q, k, v: v[:, :1]))
    with pytest.raises(ConfigError, match="none of flash, math works on cpu"):
        attention_probe.choose("auto", *arguments)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda q, k, v: attention(q, k, v) * float("nan"), "relative error nan"),
        (lambda q, k, v: attention(q, k, v).unsqueeze(0), r"the kernel's result has the shape \[1, 1, "),
    ],
)
def test_numbers_that_are_none_and_other_shapes_are_refused(
    run: attention_kernels.AttentionFn, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_kernels.KERNELS, "math", attention_kernels.Kernel(run))
    found = attention_probe.probe("math", "cpu")
    assert found.state == "fails" and re.search(reason, found.reason or "")


def _contiguous_strides(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


@pytest.mark.parametrize(
    "run",
    [
        lambda q, k, v: attention(q, k[:, : len(k[0]) // 128 * 128], v[:, : len(v[0]) // 128 * 128]),
        lambda q, k, v: attention(q, k[:, : q.shape[1]], v[:, : q.shape[1]]),
        lambda q, k, v: attention(q, k, _contiguous_strides(v)),
    ],
    ids=["without the ragged block", "with as many keys as queries", "with strides of its own"],
)
def test_a_kernel_must_be_right_for_all_calls_of_a_video(
    run: attention_kernels.AttentionFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_kernels.KERNELS, "math", attention_kernels.Kernel(run))
    found = attention_probe.probe("math", "cpu")
    assert found.state == "fails" and "for 200 queries and 333 keys" in (found.reason or "")


def test_a_package_beside_versions_that_it_does_not_know_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "is_importable", lambda module: module == "flash_attn.flash_attn_interface")
    for namespace in (SimpleNamespace(), SimpleNamespace(flash_attn_func=lambda q, k, v: {}["scale"])):
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", namespace)
        assert attention_probe.probe("fa2", "cpu").state == "fails"
    broken = attention_kernels.Kernel(lambda q, k, v: q.of_an_older_torch)  # type: ignore[attr-defined]
    monkeypatch.setitem(attention_kernels.KERNELS, "math", broken)
    assert attention_probe.probe("math", "cpu").state == "fails"


def test_a_kernel_that_one_rank_lacks_is_refused_on_all() -> None:
    def agreed(ranks: Ranks) -> str:
        if ranks.rank == 1:
            broken = attention_kernels.Kernel(lambda q, k, v: v)
            attention_kernels.KERNELS["flash"] = broken  # only in this rank's process
        try:
            return attention_probe.agree("auto", ranks, torch.float32, 24).kernel
        except ConfigError as error:
            return f"{error.is_agreed}: {error}"

    first, second = on_ranks(Mesh(ulysses=2), agreed)
    assert first == second and "--attention auto: the leader chose flash, but another rank reports: fails (" in first
    assert first.startswith("True: ")
    assert attention_probe.agree("auto", Ranks("cpu"), torch.float32, 24).kernel == "flash"


def test_flash_attention_3_may_be_built_by_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build from the authors' source has another module name, and its older versions return a tuple."""
    assert attention_probe.probe("fa3", "cpu").state == "not installed"
    monkeypatch.setattr(attention_kernels, "is_importable", lambda module: module == "flash_attn_interface")
    for as_tuple in (False, True):

        def flash_attn_func(q, k, v, as_tuple=as_tuple):
            out = attention(q, k, v)
            return (out, None) if as_tuple else out

        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
        assert attention_probe.probe("fa3", "cpu").state == "runs"


def test_flash_attention_4_gives_sums_too_and_errors_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class DSLBaseError(Exception):
        pass

    def does_not_compile(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        raise DSLBaseError("no such architecture")

    monkeypatch.setattr(attention_kernels, "is_importable", lambda module: module == "flash_attn.cute")
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", SimpleNamespace(DSLBaseError=DSLBaseError))
    for flash_attn_func, state in ((lambda q, k, v: (attention(q, k, v), None), "runs"), (does_not_compile, "fails")):
        monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
        assert attention_probe.probe("fa4", "cpu").state == state


def test_what_ran_is_recorded_and_runs_again(wanfast: Wanfast, workdir: Path) -> None:
    assert wanfast(*GOOD).exit_code == 0
    assert json.loads((workdir / "out.json").read_text())["effective"]["models"]["attention"] == "flash"
    assert json.loads((workdir / "out.json").read_text())["attention"]["why"].startswith("the first of fa3, fa4, cudnn")
    outcome = wanfast(*GOOD, "--attention", "math", "--output", "b.mp4")
    assert outcome.exit_code == 0, outcome.err
    document = json.loads((workdir / "b.json").read_text())
    assert document["effective"]["models"]["attention"] == document["plan"]["attention"] == "math"
    assert (
        wanfast("generate", "--from", "b.json", "--output", "c.mp4", "--json").document["plan"]["attention"] == "math"
    )


@pytest.mark.parametrize(
    ("kernel", "device", "words"),
    [
        ("fa3", "cuda", "--attention fa3: fa3-fwd is not installed: run `pip install 'wanfast[fa3]'`"),
        ("fa2", "cuda", "--attention fa2: flash-attn is not installed: run `pip install 'wanfast[fa2]'`"),
        ("fa4", "cuda", "--attention fa4: flash-attn-4 is not installed: run `pip install 'wanfast[fa4]'`"),
        ("fa3", "cpu", "--attention fa3 needs a GPU: use --attention auto"),
        ("cudnn", "cpu", "--attention cudnn needs a GPU: use --attention auto"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(
    wanfast: Wanfast, workdir: Path, machine: Machine, kernel: str, device: str, words: str
) -> None:
    """The kernel is refused in the plan, before anything runs."""
    machine(1, 84)
    asked = (*GOOD, "--attention", kernel, "--device", device)
    outcome = wanfast(*asked)
    assert outcome.exit_code == 2 and words in outcome.err
    assert [file.name for file in workdir.iterdir() if file.suffix != ".png"] == []
    planned_alone = wanfast(*asked, "--dry-run")
    assert planned_alone.exit_code == 0 and f"note: {words}" in planned_alone.err


def test_tf32_is_of_gpus(wanfast: Wanfast) -> None:
    outcome = wanfast(*GOOD, "--tf32", "--dry-run")
    assert outcome.exit_code == 2 and "--tf32 needs a GPU" in outcome.err
    assert wanfast(*GOOD, "--no-tf32", "--dry-run").exit_code == 0


def test_a_mode_of_compiling_needs_compiling(wanfast: Wanfast) -> None:
    outcome = wanfast(*GOOD, "--compile-mode", "max-autotune", "--dry-run")
    assert outcome.exit_code == 2 and "--compile-mode max-autotune needs --compile" in outcome.err


@pytest.mark.parametrize(
    ("precision", "tf32", "convolutions", "products"),
    [
        ("bf16", None, True, False),
        ("fp32", None, False, False),
        ("bf16", True, True, True),
        ("bf16", False, False, False),
    ],
)
def test_tf32(precision: str, tf32: bool | None, convolutions: bool, products: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        hardware.prepare("cpu", precision, tf32)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (convolutions, products)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
