"""Tests float8 attention in the loop: which calls are in float8, on any mesh, and that ranks compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_magcache_loop import APART, skipping
from tests.engine.test_rank_groups import final_latents, with_options
from tests.engine.test_sparse_attention import made
from tests.on_ranks import on_ranks
from tests.parity import relative_error
from tests.small_model import SPEC, plan_small_model
from wanfast.bench.model_folder import randomise
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.attention_probe import choose
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import BRANCHES
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models import attention, attention_kernels, dit, lossy
from wanfast.runtime.models.attention import Sequence, WholeSequence
from wanfast.runtime.models.dit import SelfAttention
from wanfast.runtime.models.projections import Fp8, Fp8Projections
from wanfast.runtime.models.rope import RotaryTables, rotary_tables
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.model_files import ModelFiles

FP8 = {"attention": "fa3-fp8", "fp8_steps": "0:4"}
Planned = Callable[..., tuple[Plan, ModelFiles]]
GRID, TOKENS = (3, 3, 3), 27  # four ranks have 7, 7, 7 and 6 tokens


@pytest.fixture
def planned(small_model: Path, workdir: Path) -> Planned:
    """Returns a function that plans a video of 48 tokens with the small model, which has two layers."""
    return lambda **options: plan_small_model(small_model, **options)


def layer_of() -> SelfAttention:
    layer = SelfAttention(DiTSpec(dim=64, num_heads=4), torch.bfloat16, attention.attention)
    randomise(layer, seed=1)
    layer.v.bias.data += 2
    layer.norm_k.weight.data += 1
    return layer.eval()


@torch.inference_mode()
def attended(layer: SelfAttention, x: Tensor, sequence: Sequence, hadamard: bool) -> Tensor:
    """Returns the attention of all tokens in float8, before the last projection."""
    rope = RotaryTables(*(sequence.shard(table, 0) for table in rotary_tables(GRID, 16)))
    projections = Fp8Projections(layer, sequence.shard(x, 1), rope, Fp8(hadamard), together=False)
    out, constant = sequence.fp8_attention(projections, TOKENS)
    return sequence.gather(out + constant, 1, TOKENS)


@pytest.mark.parametrize("hadamard", [True, False])
def test_ranks_compute_what_one_rank_computes(monkeypatch: pytest.MonkeyPatch, hadamard: bool) -> None:
    """To the last bit, if the products are: here they are computed one token at a time, as no real product is."""
    monkeypatch.setattr(dit.Linear, "forward", by_token)
    layer, x = layer_of(), torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = attended(layer, x, WholeSequence(), hadamard=hadamard)
    for ranks in (2, 4):
        mesh = Mesh(ulysses=ranks)
        for out in on_ranks(mesh, lambda ranks: attended(layer, x, ranks.sequence, hadamard=hadamard)):
            assert torch.equal(out, expected)


def by_token(self: torch.nn.Linear, x: Tensor) -> Tensor:
    return torch.stack([torch.nn.functional.linear(x[:, i], self.weight, self.bias) for i in range(x.shape[1])], dim=1)


@torch.inference_mode()
def test_a_layer_in_float8_is_near_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused or not; without the centre of v, the error is larger."""
    layer, x = layer_of(), torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = rotary_tables(GRID, 16)
    expected = layer(x, rope, TOKENS, WholeSequence())
    for fused in (False, True):
        if fused:
            layer.fuse_projections()
        seen, errors = [], torch.zeros(4)
        monkeypatch.setattr(lossy, "_check", lambda *given, seen=seen: seen.extend(given) or torch.arange(4.0))
        layer.fp8 = Fp8(True, errors)
        out = layer(x, rope, TOKENS, WholeSequence())
        error = relative_error(out, expected.double())
        assert 1e-4 < error < 0.05 and errors.tolist() == [0, 1, 2, 3]
        q, k, v, heads, constant = seen
        exact = attention.attention(q, k, v)
        assert torch.equal(layer.o(exact.flatten(2)), expected) and heads.shape == q.shape
        assert relative_error(heads + constant, exact.double()) < 0.05 < relative_error(heads, exact.double())
        layer.fp8 = Fp8(True)
        assert torch.equal(layer(x, rope, TOKENS, WholeSequence()), out)  # a check changes nothing
        layer.fp8 = Fp8(True, centres_v=False)
        assert relative_error(layer(x, rope, TOKENS, WholeSequence()), expected.double()) > 1.3 * error
        layer.fp8 = None
        assert torch.equal(layer(x, rope, TOKENS, WholeSequence()), expected)


@pytest.mark.parametrize(
    ("mesh", "fsdp"), [(Mesh(ulysses=4), "off"), (Mesh(cfg=2, ulysses=2), "on")], ids=["ulysses4", "cfg2-sharded"]
)
def test_every_mesh_gives_the_latents_and_errors_of_one_rank(planned: Planned, mesh: Mesh, fsdp: str) -> None:
    """Nearly: products of other shapes round otherwise, and a value may then round to float8 otherwise.

    With a gate of guidance, both halves of parallel guidance run the last steps alike.
    """
    plan, files = planned(**FP8, attention_check=True, guidance_gate=0.5)
    exact = final_latents(planned(attention="math")[0], files, Ranks("cpu"))
    expected, report = made(plan, files, Ranks("cpu"))
    error = relative_error(expected, exact)
    assert error > 1e-3 and report is not None and report["mean"] > 1e-3
    plan = with_options(plan, dit_fsdp=fsdp, t5_fsdp=fsdp)
    for latents, of_rank in on_ranks(mesh, lambda ranks: made(plan, files, ranks)):
        assert relative_error(latents, expected) <= error / 3
        assert of_rank is not None
        assert of_rank["mean"] == pytest.approx(report["mean"], rel=0.1)
        for forward, own in zip(report["forwards"], of_rank["forwards"], strict=True):
            assert (own["step"], own["branch"]) == (forward["step"], forward["branch"])
            assert [len(errors) for errors in own["relative_errors"]] == [8, 8]


def calls(monkeypatch: pytest.MonkeyPatch, plan: Plan, files: ModelFiles) -> list[tuple[int, str, int]]:
    """(step, branch, layer) of each call in float8."""
    found = []
    run = WholeSequence.fp8_attention

    def attending(self: Any, projections: Any, num_tokens: int) -> tuple[Tensor, Tensor]:
        running = lossy._check.__self__
        assert isinstance(running, Fp8Attention) and running._forward is not None
        found.append((running._forward.step, running._forward.branch, running._layer))
        return run(self, projections, num_tokens)

    monkeypatch.setattr(WholeSequence, "fp8_attention", attending)
    made(plan, files, Ranks("cpu"))
    return found


def test_the_schedule_decides(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned(steps=8, attention="fa3-fp8", attention_check=True, fp8_layers="1:2")
    assert plan.experts.index("low_noise") == 3
    assert calls(monkeypatch, plan, files) == [(step, branch, 1) for step in range(1, 7) for branch in BRANCHES]


def test_skipped_forwards_are_not_computed(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, files = planned(steps=8, attention="fa3-fp8", attention_check=True, fp8_steps="0:8")
    plan = skipping(plan)
    ran = [(step, of) for step in range(8) for of, skips in zip(BRANCHES, APART[step], strict=True) if not skips]
    assert calls(monkeypatch, plan, files) == [(*forward, layer) for forward in ran for layer in (0, 1)]


def test_quantized_experts_may_attend_in_float8(planned: Planned) -> None:
    weights = {"precision": "bf16", "quantize": "fp8-rowwise", "quantize_on_the_fly": True}
    exact = final_latents(*planned(attention="math", **weights), Ranks("cpu"))
    assert 1e-3 < relative_error(final_latents(*planned(**FP8, **weights), Ranks("cpu")), exact) < 0.1


def test_auto_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fa3-fp8" not in attention_kernels.KERNELS
    choice = choose("fa3-fp8", "cpu", torch.float32, 20)
    assert (choice.kernel, choice.dense) == ("fa3-fp8", "flash") and "relative error" in choice.why
    probed = attention_probe._LOSSY["fa3-fp8"]
    wrong = probed._replace(run=lambda *qkv: 1.3 * probed.run(*qkv))
    monkeypatch.setitem(attention_probe._LOSSY, "fa3-fp8", wrong)
    with pytest.raises(ConfigError, match=r"--attention fa3-fp8: fails \(the kernel's result is wrong"):
        choose("fa3-fp8", "cpu", torch.float32, 20)


def test_doctor_shows_lossy_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "is_importable", lambda module: False)
    found = attention_probe.probe_all("cuda")
    for name, extra in (("sparse", "fa4"), ("fa3-fp8", "fa3")):
        assert (found[name].state, found[name].reason) == ("not installed", f"pip install 'wanfast[{extra}]'")
        assert attention_probe.probe(name, "cpu").state == "runs"
    assert not {"sparse", "fa3-fp8"} & attention_probe.probe_all("cpu").keys()


def test_the_dimension_of_the_small_model() -> None:
    """A head of 20 channels has no Hadamard matrix, so that the loop's tests run without one."""
    assert SPEC.dit.head_dim == 20
