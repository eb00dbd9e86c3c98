"""Compares a forward with lossy attention with our compiled bf16 forward, on the same weights in the same run.

    python benchmarks/lossy.py                          # A14B's 40 layers at 1280x720x81, one GPU: density 0.35
    python benchmarks/lossy.py --density 0.5 --layers 8
    python benchmarks/lossy.py --ranks 4                # a step on one GPU and on four
    python benchmarks/lossy.py --tiny                   # a quick check, also on a CPU, also with --ranks 2

Self-attention is sparse or in float8, each with bf16 linears and with fp8 linears. All layers of the timed forwards are
lossy: no layer is guarded, which means kept dense. Some rows also make the lists of blocks ("lists made"), or measure
the error ("checked"). `shares` holds the time that this work adds, as a share of the same forward without this work. A
video uses the same lists for several steps, so the lists add less to a video. All rows are measured in turn, and the
median is reported. `ratio` is a row's time divided by the time of the compiled bf16 forward. Forwards with lossy
attention are not compiled.
`relative_error` compares the velocity after the first layers with float32, and `checked` holds the errors of heads. The
weights are random, so neither error shows what a video loses. `sampled` is about one layer. It is the share of heads
for which the error of 64 sampled queries is within a fifth of the error of all queries. `video` is the plan of a whole
video, in which the first steps and layers stay dense. `guards` predicts the mean forward of this video, and of the same
video without dense steps and layers. The prediction uses the measured forwards: exact, lossy, and with lists.
Each forward is printed when it is measured. No forward begins that would probably end after --within. After Ctrl-C or
SIGTERM, the document holds what was measured, and `interrupted` is true. The last line is one JSON document.

--ranks times a step with both branches of guidance, sparse attention and fp8 linears: on each GPU by itself, and on all
GPUs, which divide the branches and the tokens. `efficiency` is the seconds of one GPU / (the number of GPUs * their
seconds). `relative_difference` is the relative distance of the two velocities. A step that makes lists takes
`with_lists_s`. `step_s` is the mean over the steps of a video.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
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
from spawned import on_ranks
from torch import Tensor

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, ModelsConfig
from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.engine import fp8_attention, sparse_attention
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.facts.choices import BRANCHES, Branch
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, ModelSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.attention_check import sampled_errors
from wanfast.runtime.models.bricks import TokenOrder
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.lossy import run
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import plan_json, sparsity_json

BF16, MADE, CHECKED = "bf16, compiled", ", lists made", ", checked"
KINDS = ("sparse", "fp8")


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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--within", type=float, default=200, help="seconds after the imports; not with --ranks")
    parser.add_argument(
        "--error-layers", type=int, default=2, help="number of layers that are compared with float32; 0 for none"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share a step; an even number, or 1")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.size, options.frames = 2, "192x192", 17
    options.kernel = options.kernel or ("fa3" if options.device == "cuda" else "flash")
    if min(options.rounds, options.layers, options.ranks) < 1 or (options.ranks > 1 and options.ranks % 2):
        parser.error("--rounds and --layers must be 1 or more, and --ranks 1 or an even number")
    if options.ranks > 1:
        on_ranks(_shared, options)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measure(options)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    ends = time.monotonic() + options.within
    ranks, spec = Ranks(options.device), _spec(options)
    ways: list[Way] = []
    tried: list[Tried] = []
    sampled: dict[str, float] = {}
    interrupted = False
    try:
        inputs, exact = _made(options, spec)
        models = {"bf16 linears": exact, "fp8 linears": quantized(exact, "fp8-rowwise", options.kernel)}
        for model in models.values():
            model.fuse_projections()
        tried += [Tried(options, spec, name, model, inputs, ranks) for name, model in models.items()]
        ways += [_compiled(options, exact, inputs), *(way for each in tried for way in each.ways())]
        ways.sort(key=lambda way: way.name.endswith((CHECKED, "exact")))  # the ratios need the others
        for way in ways:
            forward.warm(way, options.device, ranks)
        if options.error_layers:
            forward._find_errors(ways, exact, min(options.error_layers, options.layers), inputs, ranks)
        _run_in_turn(ways, options, ranks, ends)
        sampled = tried[0].sampled()
    except KeyboardInterrupt:
        interrupted = True
    rows = {way.name: forward.report_of(way, spec.dit, inputs) for way in ways if way.seconds}
    for row in rows.values():
        row["ratio"] = round(row["ms"] / rows[BF16]["ms"], 4)  # which was timed first
    facts = _facts(options, spec) | {"interrupted": interrupted, "ways": rows, "shares": shares(rows)}
    facts |= {"checked": {name: errors for each in tried for name, errors in each.errors()}, "sampled": sampled}
    plans = {kind: [plan_of(options, spec, kind, guarded=guarded) for guarded in (True, False)] for kind in KINDS}
    facts |= {"video": sparsity_json(plans["sparse"][0]), "guards": guards(rows, plans)}
    print(json.dumps(facts | _found(options)), flush=True)
    if interrupted:
        raise SystemExit(130)


def _run_in_turn(ways: list[Way], options: argparse.Namespace, ranks: Ranks, ends: float) -> None:
    """Times all ways once, and again while they are likely to end in time; prints each forward."""
    for turn in range(options.rounds):
        for way in ways:
            likely_s = max(way.seconds, default=0.0)
            if time.monotonic() + likely_s > ends and (turn or way.name != BF16):
                continue
            forward.timed(way, options.device, ranks)
            print(f"round {turn + 1}: {way.name:32} {way.seconds[-1] * 1e3:10.1f} ms", file=sys.stderr, flush=True)


def _spec(options: argparse.Namespace) -> ModelSpec:
    return replace(A14B, dit=replace(TINY if options.tiny else A14B.dit, num_layers=options.layers))


def _made(options: argparse.Namespace, spec: ModelSpec) -> tuple[Inputs, WanDiT]:
    hardware.prepare(options.device, "bf16", None)
    g = plan_of(options, spec, "sparse").geometry
    inputs = random_inputs(spec.dit, (g.latent_frames, g.latent_height, g.latent_width), options.device)
    return inputs, random_expert(spec.dit, torch.bfloat16, options.device)


def _facts(options: argparse.Namespace, spec: ModelSpec) -> dict[str, Any]:
    plan = plan_of(options, spec, "sparse")
    return {
        "layers": options.layers,
        "tokens": plan.geometry.tokens,
        "kernel": options.kernel,
        "fp8": plan_json(plan_of(options, spec, "fp8"))["fp8_attention"],
        "sparsity": sparsity_json(plan),
    }


def _found(options: argparse.Namespace) -> dict[str, Any]:
    return {"commit": commit(), "hardware": hardware.describe(options.device), "versions": versions()}


def _shared(options: argparse.Namespace) -> None:
    mesh = Mesh(cfg=2, ulysses=options.ranks // 2)
    with rank_group(options.device, mesh, timeout_s=300) as ranks:
        measure_ranks(options, ranks)


@torch.inference_mode()
def measure_ranks(options: argparse.Namespace, ranks: Ranks) -> None:
    spec = _spec(options)
    inputs, exact = _made(options, spec)
    model = quantized(exact, "fp8-rowwise", options.kernel)
    del exact
    model.fuse_projections()
    groups = {"one": Ranks(options.device), f"cfg 2, ulysses {ranks.mesh.ulysses}": ranks}
    ways = [way for name, group in groups.items() for way in Tried(options, spec, name, model, inputs, group).steps()]
    for way in ways:
        forward.warm(way, options.device, ranks)
    for _ in range(options.rounds):
        for way in ways:
            forward.timed(way, options.device, ranks)
            if ranks.is_leader:
                print(f"{way.name:32} {way.seconds[-1] * 1e3:10.1f} ms", file=sys.stderr, flush=True)
    if not ranks.is_leader:
        return
    rows = {name: _row_of_step(ways, name, plan_of(options, spec, "sparse")) for name in groups}
    one, shared = rows.values()
    facts = _facts(options, spec) | {"ranks": ranks.size, "linears": "fp8-rowwise", "steps": rows}
    facts["efficiency"] = round(one["seconds"] / (ranks.size * shared["seconds"]), 4)
    facts["efficiency_with_lists"] = round(one["step_s"] / (ranks.size * shared["step_s"]), 4)
    outputs = [way.output for way in ways if way.output is not None and MADE not in way.name]
    facts["relative_difference"] = forward._relative_error(outputs[1], outputs[0])
    print(json.dumps(facts | _found(options)), flush=True)


def _row_of_step(ways: list[Way], name: str, plan: Plan) -> dict[str, float]:
    """Returns the median seconds of a step that uses lists and of one that makes them, and the mean over a video."""
    plain, made = (next(way for way in ways if way.name == f"{name}, sparse{end}").seconds for end in ("", MADE))
    seconds, with_lists_s = statistics.median(plain), statistics.median(made)
    step_s = seconds + _lists_share(plan) * (with_lists_s - seconds)
    spread_s = max(plain) - min(plain)
    found = {"seconds": seconds, "spread_s": spread_s, "with_lists_s": with_lists_s, "step_s": step_s}
    return {key: round(value, 4) for key, value in found.items()}


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
        own = {name: value for name, value in own.items() if name not in ("dense_share", "dense_layers", "fp8_steps")}
    answers = {"cfg_parallel": 1, "ulysses": 1, "device": options.device, "seed": 0, "attention_check": checked}
    video = {**NO_VIDEO, "size": options.size, "frames": options.frames, "fit": "crop"}
    return Plan.of(EffectiveConfig.of({**own, **answers, **video}, spec), spec, (16, 9))


def shares(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns {row: share of time}, for each row that makes lists or checks errors.

    The share is the added time divided by the time of the same forward without lists and checks.
    """
    return {
        name: round(row["ms"] / rows[plain]["ms"] - 1, 4)
        for name, row in rows.items()
        for end in (MADE, CHECKED)
        if name.endswith(end) and (plain := name.removesuffix(end)) in rows
    }


def guards(rows: dict[str, dict[str, Any]], plans: dict[str, list[Plan]]) -> dict[str, dict[str, float]]:
    """Predicts the mean seconds of a forward of a whole video, with guards and without, from rows of whole forwards.

    `plans` holds for each kind of attention the plan with guards and the one without. A layer takes the same share of
    a forward as any other one, and of the making of lists. `cost` is what the guards add, as a share of the forward
    without guards. A kind of which a forward was not measured is missing.
    """
    found = {}
    for linears in ("bf16 linears", "fp8 linears"):
        for kind, both in plans.items():
            exact, lossy = (rows.get(f"{linears}, {each}", {}).get("ms") for each in ("exact", kind))
            made = rows.get(f"{linears}, {kind}{MADE}", {}).get("ms", lossy)
            if exact is None or lossy is None:
                continue
            guarded, bare = (_mean_forward(plan, exact, lossy, made - lossy) / 1e3 for plan in both)
            found[f"{linears}, {kind}"] = {
                "lossy_calls": round(_lossy_calls(both[0]), 4),
                "with_guards_s": round(guarded, 4),
                "without_guards_s": round(bare, 4),
                "cost": round(guarded / bare - 1, 4),
                "ratio": round(guarded * 1e3 / rows[BF16]["ms"], 4),
            }
    return found


def _mean_forward(plan: Plan, exact: float, lossy: float, lists: float) -> float:
    """Returns the mean time of a video's forwards, in the unit of the times of whole forwards."""
    share = _lossy_calls(plan)
    return exact + share * (lossy - exact) + _lists_share(plan) * lists


def _lossy_calls(plan: Plan) -> float:
    """Returns the share of the calls of self-attention that are lossy in a video."""
    steps, layers = len(plan.schedule), plan.spec.dit.num_layers
    return sum(_is_lossy(plan, step, layer) for step in range(steps) for layer in range(layers)) / (steps * layers)


def _is_lossy(plan: Plan, step: int, layer: int) -> bool:
    if plan.sparsity:
        return plan.sparsity.listed(step, layer) is not None
    return plan.fp8 is not None and plan.fp8.is_fp8(step, layer)


def _lists_share(plan: Plan) -> float:
    """Returns how many lists of a layer are made in a video, divided by its steps and layers; see `SparseAttention`."""
    sparsity, made, count = plan.sparsity, None, 0
    if sparsity is None:
        return 0.0
    for step, expert in enumerate(plan.experts):
        layers = sum(_is_lossy(plan, step, layer) for layer in range(sparsity.num_layers))
        if not layers:
            continue
        if made is None or made[1] != expert or step - made[0] >= sparsity.lists_every:
            made, count = (step, expert), count + layers
    return count / (len(plan.experts) * sparsity.num_layers)


class Tried:
    """Computes the forwards of one model with each kind of self-attention."""

    def __init__(
        self,
        options: argparse.Namespace,
        spec: ModelSpec,
        name: str,
        model: WanDiT,
        inputs: Inputs,
        ranks: Ranks,
    ) -> None:
        """Stores the arguments; `ranks` share the forwards."""
        self._name, self._model, self._inputs, self._rounds = name, model, inputs, options.rounds
        self._attend, self._ranks = attention_by(options.kernel), ranks
        self._texts = dict(zip(BRANCHES, map(model.encode_text, inputs.texts), strict=True))
        self._steps = count(0, ModelsConfig.lists_every)
        self._lossy: dict[str, tuple[LossyAttention, TokenOrder]] = {}
        sparse, fp8 = SparseAttention(self._attend, spec.dit.num_heads, ranks), Fp8Attention(spec.dit.num_heads, ranks)
        for kind, lossy in (("sparse", sparse), ("fp8", fp8)):
            lossy.use_in(model)
            self._lossy[kind] = lossy, lossy.start(plan_of(options, spec, kind, checked=True))
        self._run = partial(run, attend=sparse.attend, check=fp8.check)

    def ways(self) -> Iterator[Way]:
        """Yields the forwards of the prompt's branch; those that make lists make them for the next ones too."""
        yield self._way(f"sparse{MADE}", lambda: self._velocity("sparse", next(self._steps)))
        for kind in self._lossy:
            yield self._way(kind, partial(self._velocity, kind))
            yield self._way(f"{kind}{CHECKED}", partial(self._velocity, kind, checked=True))
        yield self._way("exact", self._velocity)

    def steps(self) -> Iterator[Way]:
        """Yields steps with both branches and sparse attention; the first way makes the lists of the second one too."""
        yield self._way(f"sparse{MADE}", lambda: self._step(next(self._steps)))
        yield self._way("sparse", lambda: self._step(0))

    def _step(self, step: int) -> Tensor:
        guidance = self._ranks.guidance
        return torch.cat(guidance.velocities(BRANCHES, lambda branch: self._velocity("sparse", step, branch)))

    def _way(self, kind: str, velocity: forward.VelocityFn) -> Way:
        return Way(f"{self._name}, {kind}", velocity, self._model.blocks, self._rounds, self._ranks.size)

    def _velocity(
        self, kind: str | None = None, step: int = 0, branch: Branch = "prompt", *, checked: bool = False
    ) -> Tensor:
        for attention in self._model.self_attentions():
            attention.attend, attention.fp8 = self._attend, None
        options: dict[str, Any] = {"sequence": self._ranks.sequence}
        if kind is not None:
            lossy, order = self._lossy[kind]
            lossy._seed = 0 if checked else None
            if isinstance(lossy, SparseAttention):
                lossy.use_in(self._model)
            self._run()  # the forwards of several objects take turns
            lossy.begin(step, "low_noise", BRANCHES, branch, self._ranks)
            options |= {"order": order, "before_block": lossy.enter}
        text = self._texts[branch][: len(self._model.blocks)]
        return self._model(*self._inputs.arguments(text), **options)[0]

    def errors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, errors over all heads) of each way whose error is checked."""
        for kind, (lossy, _) in self._lossy.items():
            lossy._seed = 0
            if report := lossy.report():
                errors = {key: report[key] for key in ("mean", "of_95_percent", "largest")}
                yield f"{self._name}, {kind}{CHECKED}", errors

    def sampled(self) -> dict[str, float]:
        """Returns {"sparse" or "fp8": share of heads} in the first layer.

        A head counts if the error of its sampled queries differs by at most a fifth from the error of all its queries.
        """
        found: dict[str, float] = {}

        def compare(kind: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any) -> Tensor:
            errors = sampled_errors(q, k, v, out, *others)
            exact = self._attend(q[None], k[None], v[None])[0].float()
            constant = others[-1] if kind == "fp8" else 0
            whole = (out + constant - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))
            found[kind] = float(((errors / whole - 1).abs() <= 0.2).double().mean())
            return errors

        for kind, module in (("sparse", sparse_attention), ("fp8", fp8_attention)):
            with (
                forward.first_layers(self._model.blocks, 1),
                patch.object(module, "sampled_errors", partial(compare, kind)),
            ):
                self._velocity(kind, checked=True)
        return found


if __name__ == "__main__":
    main()
