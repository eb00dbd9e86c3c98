"""Compares the seconds of a step on several GPUs and on one: Ulysses with two kinds of exchange, parallel guidance.

    torchrun --nproc-per-node 2 benchmarks/ranks.py                     # A14B's shapes, 10 of its 40 layers
    torchrun --nproc-per-node 4 benchmarks/ranks.py --tiny              # a quick check, also on a CPU

One step is a forward of both branches of guidance. The rows are:
`one`: each rank computes the whole step. `ulysses`: all ranks share the tokens of each branch, and exchange q, k and v
one by one. `ulysses packed`: they exchange q, k and v together. `cfg`: each half of the ranks computes one branch.
`unguided`: a step without guidance, which is one branch on all ranks. `regrouped`: a step of `cfg`, and then a step of
`unguided`.
The rows are measured in turn for several rounds, and the median is reported. All ranks wait for each other before and
after each step. Weights and inputs are random. Ten layers are enough: with more layers, the work outside of the layers
would weigh less. The program prints each row's relative error against `one`. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from einops import rearrange
from random_expert import TINY, random_expert, random_inputs
from torch import Tensor

from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.cfg_parallel import BothBranches, CfgParallel
from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.distributed.ulysses import Ulysses
from wanfast.runtime.facts.choices import BRANCHES, Branch
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import Sequence, WholeSequence
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.dit import TextKV
from wanfast.runtime.models.projections import Projections


@dataclass(frozen=True)
class Packed(Ulysses):
    """Exchanges q, k and v together once, instead of one by one during the products."""

    def attention(self, projections: Projections, num_tokens: int, attend: AttentionFn) -> Tensor:
        size = self.group.size()
        packed = rearrange(torch.stack(projections.all()), "three B l (P h) D -> P three B l h D", P=size)
        all_q, all_k, all_v = rearrange(self._send(packed)(), "P three B l h D -> three B (P l) h D")
        out = attend(all_q, all_k[:, :num_tokens], all_v[:, :num_tokens])
        parts = self._send(rearrange(out, "B (P l) h D -> P B l h D", P=size))()
        return rearrange(parts, "P B l h D -> B l (P h) D")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 90, 160), help="latent frames, height, width")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = Mesh(cfg=2, ulysses=int(os.environ["WORLD_SIZE"]) // 2)
    spec = replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    grid = (3, 6, 10) if options.tiny else tuple(options.grid)
    with rank_group(device, mesh, timeout_s=600) as ranks:
        measure(spec, grid, ranks, options.rounds)


@torch.inference_mode()
def measure(spec: DiTSpec, grid: tuple[int, int, int], ranks: Ranks, rounds: int) -> None:
    device = ranks.device
    model, inputs = random_expert(spec, torch.bfloat16, device), random_inputs(spec, grid, device)
    texts = [model.encode_text(text) for text in inputs.texts]

    def step(
        sequence: Sequence, guidance: BothBranches | CfgParallel, branches: tuple[Branch, ...] = BRANCHES
    ) -> Callable[[], list[Tensor]]:
        def velocities() -> list[Tensor]:
            texts_of: dict[Branch, list[TextKV]] = dict(zip(BRANCHES, texts, strict=True))
            return guidance.velocities(
                branches, lambda branch: model(*inputs.arguments(texts_of[branch]), sequence=sequence)[0]
            )

        return velocities

    world = dist.group.WORLD
    assert world is not None
    ways = {
        "one": step(WholeSequence(), BothBranches()),
        "ulysses": step(Ulysses(world), BothBranches()),
        "ulysses packed": step(Packed(world), BothBranches()),
        "cfg": step(ranks.sequence, ranks.guidance),
        "unguided": step(ranks.unguided.sequence, ranks.unguided.guidance, BRANCHES[:1]),
    }
    ways["regrouped"] = lambda: [*ways["cfg"](), *ways["unguided"]()][:2]
    outputs = {name: way() for name, way in ways.items()}  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way, device))
    if dist.get_rank() != 0:
        return
    exact = torch.cat(outputs["one"]).double()
    forwards = {"unguided": 1, "regrouped": 3}
    report = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        difference = torch.cat(outputs[name]).double() - exact[: len(outputs[name])]
        one_s = statistics.median(seconds["one"]) * forwards.get(name, 2) / 2
        report[name] = {
            "seconds": round(median, 4),
            "spread": round(max(values) - min(values), 4),
            "efficiency": round(one_s / median / (1 if name == "one" else ranks.size), 4),
            "relative_error": float(difference.norm() / exact[: len(difference)].norm()),
        }
        print(name, report[name], flush=True)
    tokens = inputs.rope.cos.shape[0]
    medians = {name: way["seconds"] for name, way in report.items()}
    regrouping = {
        "unguided_share": round(medians["unguided"] / medians["cfg"], 4),
        "regrouping_ms": round((medians["regrouped"] - medians["cfg"] - medians["unguided"]) * 1000, 2),
    }
    facts = {
        "ranks": ranks.size,
        **regrouping,
        "layers": spec.num_layers,
        "tokens": tokens,
        "rounds": rounds,
        "hardware": hardware.describe(device),
    }
    print(json.dumps({**facts, "ways": report, "commit": commit(), "versions": versions()}), flush=True)


def timed(way: Callable[[], list[Tensor]], device: str) -> float:
    def settle() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    settle()
    started = time.perf_counter()
    way()
    settle()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
