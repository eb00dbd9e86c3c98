"""Compares a forward with lossy attention with our compiled bf16 forward, on the same weights in the same run.

    python benchmarks/lossy.py                          # A14B's 40 layers at 1280x720x81, one GPU: density 0.35
    python benchmarks/lossy.py --density 0.5 --layers 8
    python benchmarks/lossy.py --tiny                   # a quick check, also on a CPU

Self-attention is sparse or in float8, each with bf16 linears and with fp8 linears. All layers of the timed forwards are
lossy: no layer is guarded, which means kept dense. Some rows also make the lists of blocks ("lists made"), or measure
the error ("checked"). `shares` holds the time that this work adds, as a share of the same forward without this work. A
video uses the same lists for several steps, so the lists add less to a video. All rows are measured in turn, and the
median is reported. `ratio` is a row's time divided by the time of the compiled bf16 forward. Forwards with lossy
attention are not compiled.
`relative_error` compares the velocity after the first layers with float32, and `checked` holds the errors of heads. The
weights are random, so neither error shows what a video loses. `sampled` is about one layer. It is the share of heads
for which the error of 64 sampled queries is within a fifth of the error of all queries. `video` is the plan of a whole
video, in which the first steps and layers stay dense. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import forward
import torch
from forward import Way
from quantized import quantized
from random_expert import TINY, Inputs, random_expert, random_inputs
from torch import Tensor

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, ModelsConfig
from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import fp8_attention, sparse_attention
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.facts.choices import BRANCHES
from wanfast.runtime.facts.model_spec import A14B, ModelSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.attention_check import sampled_errors
from wanfast.runtime.models.bricks import TokenOrder
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json, sparsity_json

BF16, MADE, CHECKED = "bf16, compiled", ", lists made", ", checked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--density", type=float, default=0.35)
    parser.add_argument(
        "--hadamard",
        action=argparse.BooleanOptionalAction,
        help="multiply q and k by a Hadamard matrix in float8, as --fp8-hadamard does",
    )
    parser.add_argument(
        "--kernel", default=None, help="kernel of exact attention  [default: fa3 on a GPU, flash on a CPU]"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--error-layers", type=int, default=2, help="number of layers that are compared with float32; 0 for none"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.size, options.frames = 2, "192x192", 17
    options.kernel = options.kernel or ("fa3" if options.device == "cuda" else "flash")
    measure(options)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    hardware.prepare(options.device, "bf16", None)
    ranks, dit = Ranks(options.device), replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    spec = replace(A14B, dit=dit)
    plan = plan_of(options, spec, "sparse")
    g = plan.geometry
    inputs = random_inputs(dit, (g.latent_frames, g.latent_height, g.latent_width), options.device)
    exact = random_expert(dit, torch.bfloat16, options.device)
    models = {"bf16 linears": exact, "fp8 linears": quantized(exact, "fp8-rowwise", options.kernel)}
    for model in models.values():
        model.fuse_projections()
    tried = [Tried(options, spec, name, model, inputs) for name, model in models.items()]
    ways = [_compiled(options, exact, inputs), *(way for each in tried for way in each.ways())]
    for way in ways:
        forward.warm(way, options.device, ranks)
        way.velocity()  # makes the lists of all layers
    if options.error_layers:
        forward._find_errors(ways, exact, min(options.error_layers, options.layers), inputs, ranks)
    for _ in range(options.rounds):
        for way in ways:
            forward.timed(way, options.device, ranks)
    rows = {way.name: forward.report_of(way, dit, inputs) for way in ways}
    for row in rows.values():
        row["ratio"] = round(row["ms"] / rows[BF16]["ms"], 4)
    facts = {
        "layers": options.layers,
        "tokens": g.tokens,
        "kernel": options.kernel,
        "fp8": plan_json(plan_of(options, spec, "fp8"))["fp8_attention"],
    }
    facts |= {"sparsity": sparsity_json(plan), "ways": rows, "shares": shares(rows)}
    facts |= {"checked": {name: errors for each in tried for name, errors in each.errors()}}
    facts |= {"sampled": tried[0].sampled(), "video": sparsity_json(plan_of(options, spec, "sparse", guarded=True))}
    found = {"commit": commit(), "hardware": hardware.describe(options.device), "versions": versions()}
    print(json.dumps({**facts, **found}), flush=True)


def _compiled(options: argparse.Namespace, model: WanDiT, inputs: Inputs) -> Way:
    twin = forward._twin(model, options.kernel)
    if options.device == "cuda":
        compile_blocks(twin, "default")
    return Way(BF16, forward.velocity_of(twin, inputs, twin.encode_text(inputs.texts[0])), twin.blocks, options.rounds)


def plan_of(
    options: argparse.Namespace, spec: ModelSpec, kind: str, *, checked: bool = False, guarded: bool = False
) -> Plan:
    """Returns the plan of a video with sparse or fp8 attention; unless it is `guarded`, all calls are lossy."""
    own: dict[str, Any] = {"attention": "sparse", "density": options.density, "dense_share": 0.0, "dense_layers": 0}
    if kind == "fp8":
        own = {"attention": "fa3-fp8", "fp8_hadamard": options.hadamard, "fp8_steps": f"0:{spec.steps}"}
    if guarded:
        own = {"attention": "sparse", "density": options.density}
    answers = {"cfg_parallel": 1, "ulysses": 1, "device": options.device, "seed": 0, "attention_check": checked}
    video = {**NO_VIDEO, "size": options.size, "frames": options.frames, "fit": "crop"}
    return Plan.of(EffectiveConfig.of({**own, **answers, **video}, spec), spec, (16, 9))


def shares(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns {row: share of time}, for each row that makes lists or checks errors.

    The share is the added time divided by the time of the same forward without lists and checks.
    """
    return {
        name: round(row["ms"] / rows[name.removesuffix(end)]["ms"] - 1, 4)
        for name, row in rows.items()
        for end in (MADE, CHECKED)
        if name.endswith(end)
    }


class Tried:
    """Computes the forwards of one model with each kind of self-attention."""

    def __init__(self, options: argparse.Namespace, spec: ModelSpec, name: str, model: WanDiT, inputs: Inputs) -> None:
        self._name, self._model, self._inputs, self._rounds = name, model, inputs, options.rounds
        self._attend, self._ranks = attention_by(options.kernel), Ranks(options.device)
        self._text = model.encode_text(inputs.texts[0])
        self._lossy: dict[str, tuple[LossyAttention, TokenOrder]] = {}
        for kind in ("sparse", "fp8"):
            for end in ("", CHECKED):
                heads = spec.dit.num_heads
                sparse = SparseAttention(self._attend, heads, self._ranks)
                lossy = sparse if kind == "sparse" else Fp8Attention(heads, self._ranks)
                lossy.use_in(model)
                self._lossy[kind + end] = lossy, lossy.start(plan_of(options, spec, kind, checked=bool(end)))

    def ways(self) -> Iterator[Way]:
        yield self._way("exact", self._velocity)
        for kind, lossy in self._lossy.items():
            yield self._way(kind, partial(self._velocity, lossy))
        lists_every = ModelsConfig.lists_every
        steps = count(0, lists_every)
        yield self._way(f"sparse{MADE}", lambda: self._velocity(self._lossy["sparse"], next(steps)))

    def _way(self, kind: str, velocity: forward.VelocityFn) -> Way:
        return Way(f"{self._name}, {kind}", velocity, self._model.blocks, self._rounds)

    def _velocity(self, lossy: tuple[LossyAttention, TokenOrder] | None = None, step: int = 0) -> Tensor:
        for attention in self._model.self_attentions():
            attention.attend, attention.fp8 = self._attend, None
        options: dict[str, Any] = {}
        if lossy:
            if isinstance(lossy[0], SparseAttention):
                lossy[0].use_in(self._model)
            lossy[0].begin(step, "low_noise", BRANCHES, "prompt", self._ranks)
            options = {"order": lossy[1], "before_block": lossy[0].enter}
        return self._model(*self._inputs.arguments(self._text[: len(self._model.blocks)]), **options)[0]

    def errors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, errors over all heads) of each way whose error is checked."""
        for kind, (lossy, _) in self._lossy.items():
            if report := lossy.report():
                yield f"{self._name}, {kind}", {key: report[key] for key in ("mean", "of_95_percent", "largest")}

    def sampled(self) -> dict[str, float]:
        """Returns {"sparse" or "fp8": share of heads} in the first layer.

        A head counts if the error of its sampled queries differs by at most a fifth from the error of all its queries.
        """
        found: dict[str, float] = {}

        def compare(kind: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any) -> Tensor:
            errors = sampled_errors(q, k, v, out, *others)
            exact = self._attend(q[None], k[None], v[None])[0].float()
            whole = (out.float() - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))
            found[kind] = float(((errors / whole - 1).abs() <= 0.2).double().mean())
            return errors

        for kind, module in (("sparse", sparse_attention), ("fp8", fp8_attention)):
            with (
                forward.first_layers(self._model.blocks, 1),
                patch.object(module, "sampled_errors", partial(compare, kind)),
            ):
                self._velocity(self._lossy[kind + CHECKED])
        return found


if __name__ == "__main__":
    main()
