"""Measures the seconds until the first step is done: with empty caches, with filled caches, and after a warmup.

    python benchmarks/warm_start.py                                   # one GPU, A14B's shapes at 1280x720x81
    python benchmarks/warm_start.py --layers 10 --branches 1          # the work of one of eight GPUs in a step
    python benchmarks/warm_start.py --tiny                            # a quick check, also on a CPU

Every start is a fresh process. "cold" starts with empty caches. "second" uses the caches of the cold process.
"received" has empty caches, but uses an artifact that `wanfast warmup` made with caches of its own. "eager" compiles
nothing, and finds its Triton kernels in the cache. Weights are random.
As in a generation, attention is probed first, and torch's compiler is imported while the weights are made. The clock
starts when both are done. The clock stops when the first step is done, so the time covers loading the artifact,
tracing, compiling and the step. Two more steps give the time of a single step. `import_s` is the time for which the
import went on after the weights were made. In a generation, reading the weights takes seconds, so that the import may
cost no time. --tiny sets size, frames, attention and layers. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from wanfast.runtime.machine.packages import commit

COMMON = ("layers", "branches", "size", "frames", "attention", "compile_mode")
STARTS = ("eager", "cold", "second", "received")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--branches", type=int, default=2, help="forwards per step")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--attention", default="fa3")
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(_start(options)))
        return
    if options.tiny:
        options.size, options.frames, options.attention, options.layers = "64x64", 5, "flash", 2
    with tempfile.TemporaryDirectory() as scratch:
        _compare(options, Path(scratch))


def _compare(options: argparse.Namespace, scratch: Path) -> None:
    model = "tiny" if options.tiny else "a14b"
    size = (f"--size={options.size}", f"--frames={options.frames}", f"--attention={options.attention}")
    warmup = ("-m", "wanfast", "warmup", f"--model={model}", *size, f"--compile-mode={options.compile_mode}", "--json")
    nothing = scratch / "no-artifacts"
    start = (__file__, "--start", *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in COMMON))
    start += ("--tiny",) if options.tiny else ()
    eager = (*start, "--eager")
    _run(scratch / "d", nothing, *eager)
    found = {
        "eager": _run(scratch / "d", nothing, *eager),
        "cold": _run(scratch / "a", nothing, *start),
        "second": _run(scratch / "a", nothing, *start),
        "warmup": _run(scratch / "b", scratch / "artifacts", *warmup),
        "received": _run(scratch / "c", scratch / "artifacts", *start),
    }
    assert found["received"]["compile_cache"] == Path(found["warmup"]["output"]).name, "the artifact was not used"
    assert found["cold"]["compile_cache"] is None
    cold = found["cold"]
    for name in STARTS:
        way = found[name]
        way["ratio"] = round(way["first_s"] / cold["first_s"], 4)
        way["ratio_beyond_a_step"] = round((way["first_s"] - way["step_s"]) / (cold["first_s"] - cold["step_s"]), 4)
        print(f"{name:9} {way}", file=sys.stderr)
    facts = {name: getattr(options, name) for name in COMMON} | {"commit": commit()}
    kept = {name: found["warmup"][name] for name in ("bytes", "seconds", "hardware", "versions")}
    print(json.dumps({**facts, **{name: found[name] for name in STARTS}, "warmup": kept}))


def _run(caches: Path, artifacts: Path, *arguments: str) -> dict[str, Any]:
    """Returns the JSON of a fresh process's last line, with the seconds of the whole process added."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "WANFAST_ARTIFACTS": str(artifacts),
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document | {"process_s": round(time.perf_counter() - began, 2)}


def _start(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, in one process, the first step after the models are loaded, and two more steps."""
    import torch
    from random_expert import random_expert, random_inputs

    from wanfast.commands.warmup import planned
    from wanfast.runtime.device.hardware import prepare, use_few_threads
    from wanfast.runtime.device.timing import synchronize
    from wanfast.runtime.distributed.ranks import Ranks
    from wanfast.runtime.engine import attention_probe
    from wanfast.runtime.engine.compilation import (
        cache_inputs,
        compile_blocks,
        compiler_imported_meanwhile,
        load_caches,
    )
    from wanfast.runtime.models.attention import attention_by
    from wanfast.runtime.store.artifacts import ArtifactStore

    names = ("size", "frames", "attention", "compile_mode")
    asked = {"model": "tiny" if options.tiny else "a14b", **{name: getattr(options, name) for name in names}}
    plan, _ = planned(asked)
    config, spec = plan.config, replace(plan.spec.dit, num_layers=options.layers)
    prepare(config.ranks.device, config.models.precision, config.models.tf32)
    use_few_threads(config.ranks.device, spec.dim)
    kernel = attention_probe.choose(config.models.attention, config.ranks.device, torch.bfloat16, spec.head_dim).kernel
    config = config.replace(attention=kernel)
    measured = replace(plan, config=config, spec=replace(plan.spec, dit=spec))
    ranks, g = Ranks(config.ranks.device), plan.geometry

    def settle() -> float:
        synchronize(config.ranks.device)
        return time.perf_counter()

    with torch.inference_mode():
        inputs = random_inputs(spec, (g.latent_frames, g.latent_height, g.latent_width), config.ranks.device)
        with nullcontext() if options.eager else compiler_imported_meanwhile(config):
            model = random_expert(
                spec, torch.bfloat16, config.ranks.device, attend=attention_by(config.models.attention)
            )
            model.fuse_projections()
            made = settle()
        began = settle()
        store = ArtifactStore(Path(os.environ["WANFAST_ARTIFACTS"]))
        key = None
        if not options.eager:
            key = load_caches(store, cache_inputs(measured, kernel), ranks, is_named=True)
            compile_blocks(model, config.models.compile_mode)
        ends = [began]
        for _ in range(3):
            for text in inputs.texts[: options.branches]:
                model(*inputs.arguments(model.encode_text(text)))
            ends.append(settle())
    steps = [round(end - start, 3) for start, end in itertools.pairwise(ends)]
    return {"compile_cache": key, "import_s": round(began - made, 3), "first_s": steps[0], "step_s": min(steps[1:])}


if __name__ == "__main__":
    main()
