"""Measures what a skipped forward costs: times the loop of a generation with MagCache and without.

    python benchmarks/magcache.py                          # A14B's 40 layers, 40 steps, the area of 832x480, one GPU
    python benchmarks/magcache.py --steps 20 --rounds 2
    python benchmarks/magcache.py --tiny                   # a quick check, also on a CPU

The loop is the pipeline's own. One expert with random weights is used as both experts. The plan of the skips comes from
the published curve. The cost of skipping is (median time with skips / median time without) / (share of computed
forwards) - 1; 0 means that a skipped forward is free. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from random_expert import TINY, random_expert
from torch import Tensor

from wanfast.runtime.config import EffectiveConfig, magcache_settings
from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import synchronize
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.attention_probe import Choice
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.facts.choices import Branch, MagCacheRule
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import magcache_json
from wanfast.runtime.sampling.magcache import resample
from wanfast.runtime.store.curves import Curve, published_curve, steps_of
from wanfast.runtime.weights.experts import ResidentExperts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--settings", type=settings, default="E012K2R20")
    parser.add_argument("--rule", choices=get_args(MagCacheRule), default="low-noise-only")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kernel", default=None, help="attention  [default: fa3 on a GPU, flash on a CPU]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.size = 2, "64x48"
    options.kernel = options.kernel or ("fa3" if options.device == "cuda" else "flash")
    measure(options)


def settings(name: str) -> tuple[float, int, float]:
    found = magcache_settings(name)
    if found is None:
        raise argparse.ArgumentTypeError("write settings as E012K2R20")
    return found


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    device = options.device
    hardware.prepare(device, "bf16", None)
    dit = replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    model = random_expert(dit, torch.bfloat16, device, attend=attention_by(options.kernel))
    model.fuse_projections()
    if device == "cuda":
        compile_blocks(model, "default")
    spec = replace(A14B, dit=dit, frames=5 if options.tiny else A14B.frames)
    full, cached = plans(options, spec)
    ranks, choice = Ranks(device), Choice(options.kernel, "asked for")
    pipeline = VideoPipeline(
        spec, ResidentExperts({"high_noise": model, "low_noise": model}, device), None, ranks, choice
    )
    generator, g = torch.Generator(device).manual_seed(1), full.geometry

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    noise, condition = (normal(1, c, g.latent_frames, g.latent_height, g.latent_width) for c in (16, 20))
    text: dict[Branch, Tensor] = {name: normal(dit.text_len // 8, dit.text_dim) for name in get_args(Branch)}

    def seconds(plan: Plan) -> float:
        synchronize(device)
        started = time.perf_counter()
        latent = pipeline.denoise(plan, noise, condition, text, plan.residuals(), lambda done, expert: None)
        synchronize(device)
        assert torch.isfinite(latent).all()
        return time.perf_counter() - started

    warm = replace(full, schedule=full.schedule[:1], experts=full.experts[:1])
    seconds(warm)  # compiles
    found: dict[str, list[float]] = {"full": [], "cached": []}
    for _ in range(options.rounds):
        for name, plan in (("full", full), ("cached", cached)):
            hardware.reset_peak_memory(device)
            found[name].append(seconds(plan))
            print(
                f"{name}: {found[name][-1]:.2f} s, peak {hardware.peak_memory_bytes(device) / 1e9:.1f} GB", flush=True
            )
    times = {name: statistics.median(values) for name, values in found.items()}
    plan = cast(dict[str, Any], magcache_json(cached))
    ratio, share = times["cached"] / times["full"], 1 - plan["skipped_forwards"] / plan["total_forwards"]
    print(f"{ratio:.4f} of the time for {share:.4f} of the forwards: skipping costs {ratio / share - 1:+.2%}")
    facts = {"layers": dit.num_layers, "size": f"{g.width}x{g.height}", "frames": g.frames, "tokens": g.tokens}
    result = {"seconds": found, "ratio": round(ratio, 4), "share": round(share, 4), "cost": round(ratio / share - 1, 4)}
    machine = {"commit": commit(), "hardware": hardware.describe(device), "versions": versions()}
    print(json.dumps({**facts, **result, "magcache": plan, "kernel": options.kernel, **machine}))


def plans(options: argparse.Namespace, spec: Any) -> tuple[Plan, Plan]:
    """Returns the plan without skipping and the plan with skipping."""
    threshold, max_skips, retention = options.settings
    given = {
        "image": "none", "prompt": "none", "size": options.size, "steps": options.steps, "device": options.device,
        "magcache": "preset", "magcache_thresh": threshold, "magcache_k": max_skips, "retention_ratio": retention,
        "magcache_rule": options.rule, "magcache_joint": "off", "cfg_parallel": 1, "ulysses": 1,
    }  # fmt: skip
    config = EffectiveConfig.of(given, spec)
    known = published_curve()
    of, to = (steps_of("unipc", steps, spec.shift, spec.boundary) for steps in (known["steps"], options.steps))
    ratios = resample([(first, second) for first, second in known["ratios"]], of, to)
    width, height = map(int, options.size.split("x"))
    full = Plan.of(config, spec, (width, height))
    return full, replace(full, curve=Curve("preset", tuple(ratios)))


if __name__ == "__main__":
    main()
