"""Compares the seconds of a step of two versions on several GPUs: each runs in turn, in processes of its own.

    git worktree add out/2afeaf8 2afeaf8
    python benchmarks/ranks_in_turn.py --checkout out/2afeaf8 --checkout . --ranks 4
    python benchmarks/ranks_in_turn.py --checkout . --checkout . --tiny --turns 1     # a quick check, also on a CPU

One step is both branches of guidance on the mesh cfg 2 x Ulysses N/2, compiled as in a video. This program and its
random weights serve all checkouts, of which only the folder `wanfast` is used: a commit is old enough if it has
`Ranks.guidance` and `Ranks.sequence`. In each turn `torchrun` starts the ranks of each checkout. The slowest rank of a
step counts. `ratio` is the median of the last checkout divided by that of the first one, and `ratios` is the same turn
by turn. `checkout` is the folder's name, because a copied folder may not know its commit. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="a folder that holds wanfast")
    parser.add_argument("--ranks", type=int, default=2, help="an even number")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="steps in each turn")
    parser.add_argument("--grid", type=int, nargs=3, default=[21, 90, 160], help="latent frames, height, width")
    parser.add_argument("--kernel", default=None, help="attention  [default: fa3 on a GPU, flash on a CPU]")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.grid = 2, [3, 6, 10]
    if options.step:
        _step(options)
        return
    if len(options.checkout) != 2 or options.ranks < 2 or options.ranks % 2:
        parser.error("give --checkout twice, and an even number of --ranks")
    print(json.dumps(compare(options)))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document: a row for each checkout, and the ratio of the last one to the first."""
    turns: list[list[dict[str, Any]]] = []
    for _ in range(options.turns):
        turns.append([_ranks(checkout.resolve(), options) for checkout in options.checkout])
        print([found["step_s"] for found in turns[-1]], file=sys.stderr, flush=True)
    rows = []
    for checkout, found in zip(options.checkout, zip(*turns, strict=True), strict=True):
        step_s = [seconds for turn in found for seconds in turn["step_s"]]
        figures = {"median_s": round(statistics.median(step_s), 4), "spread_s": round(max(step_s) - min(step_s), 4)}
        first_s = [turn["first_s"] for turn in found]
        rows.append(
            {"checkout": checkout.resolve().name, "commit": found[0]["commit"], **figures}
            | {"step_s": step_s, "first_s": first_s}
        )
    ratios = [statistics.median(last["step_s"]) / statistics.median(first["step_s"]) for first, *_, last in turns]
    facts = {name: turns[0][0][name] for name in ("mesh", "tokens", "kernel", "hardware")}
    asked = {name: getattr(options, name) for name in ("ranks", "turns", "layers", "rounds", "compile")}
    known = {"commit": rows[-1]["commit"], "versions": turns[0][-1]["versions"]}
    ratio = {
        "ratio": round(rows[-1]["median_s"] / rows[0]["median_s"], 4),
        "ratios": [round(each, 4) for each in ratios],
    }
    return {**asked, **facts, **ratio, "rows": rows, **known}


def _ranks(checkout: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts the ranks of one checkout, and returns what its leader prints."""
    words = ["--step", f"--layers={options.layers}", f"--rounds={options.rounds}", "--grid", *map(str, options.grid)]
    words += [f"--kernel={options.kernel}"] if options.kernel else []
    words += ["--compile" if options.compile else "--no-compile", *(["--tiny"] if options.tiny else [])]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(checkout), os.environ.get("PYTHONPATH", "")))}
    if checkout != ROOT.resolve():
        environment.pop("WANFAST_COMMIT", None)  # which names this checkout's
    command = [sys.executable, *torchrun, __file__, *words]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    document: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    assert Path(document["package"]).parents[1] == checkout, f"{document['package']} was imported, not {checkout}"
    return document


def _step(options: argparse.Namespace) -> None:
    """Times steps in one rank, with the wanfast that this process imports; the leader prints a JSON document."""
    import torch
    from random_expert import TINY, random_expert, random_inputs

    import wanfast
    from wanfast.runtime.device import hardware
    from wanfast.runtime.device.timing import synchronize
    from wanfast.runtime.distributed.ranks import rank_group
    from wanfast.runtime.engine.compilation import compile_blocks
    from wanfast.runtime.facts.mesh import Mesh
    from wanfast.runtime.facts.model_spec import A14B
    from wanfast.runtime.machine.packages import commit, versions
    from wanfast.runtime.models.attention import attention_by

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = options.kernel or ("fa3" if device == "cuda" else "flash")
    mesh = Mesh(cfg=2, ulysses=int(os.environ["WORLD_SIZE"]) // 2)
    spec = replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    hardware.prepare(device, "bf16", None)
    with rank_group(device, mesh, 600) as ranks, torch.inference_mode():
        inputs = random_inputs(spec, tuple(options.grid), device)
        model = random_expert(spec, torch.bfloat16, device, ranks.sequence, attention_by(kernel))
        model.fuse_projections()
        if options.compile:
            compile_blocks(model, "default")
        texts = {
            branch: model.encode_text(text)
            for branch, text in zip(("prompt", "negative_prompt"), inputs.texts, strict=True)
        }

        def step() -> float:
            synchronize(device)
            ranks.gather(None)
            started = time.perf_counter()
            ranks.guidance.velocities(list(texts), lambda branch: model(*inputs.arguments(texts[branch]))[0])
            synchronize(device)
            return max(ranks.gather(time.perf_counter() - started))

        first_s, *step_s = [round(step(), 5) for _ in range(1 + options.rounds)]
        if ranks.is_leader:
            facts = {"mesh": {"cfg": mesh.cfg, "ulysses": mesh.ulysses}, "tokens": inputs.rope.cos.shape[0]}
            facts |= {"kernel": kernel, "hardware": hardware.describe(device), "package": wanfast.__file__}
            known = {"commit": commit(), "versions": versions()}
            print(json.dumps({"first_s": first_s, "step_s": step_s, **facts, **known}), flush=True)


if __name__ == "__main__":
    main()
