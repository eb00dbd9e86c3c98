"""Measures what fewer forwards save and cost on the tiny model; `make tiny-magcache` runs this module.

From each held-out pair of image and prompt, one video is made without skipping. With each setting of MagCache, three
videos are made:

* "greedy" skips until the error reaches a threshold.
* "least error" skips as many forwards as "greedy", within the same limits, but with the least accumulated error.
* "extrapolated" skips the same forwards as "least error", and extrapolates their residuals.

Other videos are made without MagCache: one with each of three values of `--guidance-gate`, which stops guidance early,
and one with the recipe `hybrid`. The recipe is left out if the model's folder lacks its LoRAs. With
the middle value of `--guidance-gate`, and with the recipe, two more videos are made that also use MagCache: "least
error" and "extrapolated".

Each video is compared with the unskipped video of the same seed (PSNR, SSIM) and with the true clip (PSNR), and the
tracker classifies the video's motion. The command writes JSON and plots quality over the share of saved forwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from wanfast.quality import metrics
from wanfast.quality.distilled import PAIR, distilled, missing_lora
from wanfast.quality.tiny import Judge, Settings, judge_all, require_plotting, share_right, write
from wanfast.quality.tracking import classify
from wanfast.runtime.config import magcache_settings
from wanfast.runtime.engine import pixels
from wanfast.runtime.facts.choices import MagCacheRule
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import magcache_json
from wanfast.runtime.store import model_files
from wanfast.runtime.store.curves import curve_of

SETTINGS: tuple[tuple[MagCacheRule, str], ...] = (
    ("low-noise-only", "E006K2R20"),
    ("low-noise-only", "E012K2R20"),
    ("low-noise-only", "E024K2R10"),
    ("low-noise-only", "E048K4R10"),
    ("both-experts", "E004K2R20"),
    ("both-experts", "E012K2R20"),
    ("both-experts", "E024K2R20"),
    ("both-experts", "E024K4R10"),
)


GATES = (0.3, 0.5, 0.7)
CACHED_GATE = 0.5  # it and the hybrid are also measured with both caches, by this setting:
CACHED: tuple[MagCacheRule, str] = ("both-experts", "E012K2R20")

PlanKind = Literal["no skips", "greedy", "least error", "extrapolated"]


@dataclass(frozen=True)
class SkippingWay:
    """Holds a plan that saves forwards, the name of the plan's settings, and how the plan skips.

    For example, the name "E012K2R20, both-experts" means threshold 0.12, at most 2 skips in a row, retention ratio 0.2,
    and --magcache-rule both-experts.
    """

    settings: str
    kind: PlanKind
    plan: Plan


def ways(full: Plan, judge: Judge) -> list[SkippingWay]:
    """Returns the three plans of `cached` for each setting of MagCache in SETTINGS, as `SkippingWay` objects.

    `full`: the plan of the video without skipping.
    """
    return [
        SkippingWay(f"{name}, {rule}", kind, plan)
        for rule, name in SETTINGS
        for kind, plan in cached(full, judge, rule, name).items()
    ]


def cached(full: Plan, judge: Judge, rule: MagCacheRule, name: str) -> dict[PlanKind, Plan]:
    """Returns three plans that make the video of the plan `full` with MagCache; `full` itself uses no MagCache.

    `rule`: the value of --magcache-rule. `name`: the threshold and the limits of MagCache, such as E012K2R20. The keys
    of the result are:

    * "greedy" skips forwards until the accumulated error reaches the threshold.
    * "least error" skips as many forwards as "greedy", but with the least accumulated error.
    * "extrapolated" skips the same forwards as "least error", and extrapolates their residuals.
    """
    settings = magcache_settings(name)
    assert settings is not None
    threshold, max_skips, retention = settings
    limits = {"magcache": "preset", "magcache_k": max_skips, "retention_ratio": retention, "magcache_rule": rule}
    limits["magcache_joint"] = "off"  # as published
    config = full.config.replace(**limits, magcache_thresh=threshold)
    greedy = dataclasses.replace(full, config=config, curve=curve_of(config, judge.files))
    best_config = config.replace(magcache_thresh=None, magcache_skip=sum(map(sum, greedy.skips)))
    best = dataclasses.replace(greedy, config=best_config)
    extrapolated = dataclasses.replace(best, config=best_config.replace(magcache_extrapolate=True))
    return {"greedy": greedy, "least error": best, "extrapolated": extrapolated}


def other_ways(full: Plan, judge: Judge) -> list[SkippingWay]:
    """Returns the plans that save forwards by `--guidance-gate` or by the recipe `hybrid`.

    `full`: the plan of the video without skipping. Each value of `--guidance-gate` in GATES has one plan without
    MagCache, and so has the recipe. For the value CACHED_GATE and for the recipe, there are also two plans with
    MagCache. If the model's folder lacks the recipe's LoRAs, the recipe is left out.
    """
    plans = {f"gate {gate:g}": judge.plan_of(full.config.replace(guidance_gate=gate)) for gate in GATES}
    both_caches = {f"gate {CACHED_GATE:g}"}
    if not missing_lora(judge.files, "hybrid", PAIR):
        plans["hybrid"] = judge.plan_of(distilled(full.config, "hybrid", judge.files, PAIR))
        both_caches |= {"hybrid"}
    found = []
    for name, plan in plans.items():
        found.append(SkippingWay(name, "no skips", plan))
        if name in both_caches:
            rule, setting = CACHED
            of_kind = cached(plan, judge, rule, setting)
            kinds: tuple[PlanKind, ...] = ("least error", "extrapolated")
            found += [SkippingWay(f"{name}, {setting}, {rule}", kind, of_kind[kind]) for kind in kinds]
    return found


@torch.inference_mode()
def judged(judge: Judge, task: tuple[int, bool]) -> list[dict[str, Any]]:
    """Makes videos from one held-out scene, and returns a row of metrics for each video.

    `task` is (the scene's index, whether the plans of `other_ways` are measured too). The first row is for the video
    without skipping. The next rows are for the plans of `ways`, and the last rows for the plans of `other_ways`.
    """
    index, with_others = task
    scene, truth = judge.held_out(index)
    full = judge.plan_of(judge.config.replace(seed=index))
    reference = judge.by_plan(judge.pipeline, full, scene.caption, truth[:, 0])
    made = {_key(full): reference}  # plans that compute the same forwards in the same way make the same video
    rows = []
    for plan in (full, *(way.plan for way in _all_ways(full, judge, with_others))):
        key = _key(plan)
        if key not in made:
            made[key] = judge.by_plan(judge.pipeline_of(plan.config), plan, scene.caption, truth[:, 0])
        video = made[key]
        rows.append(
            {
                "asked": scene.motion,
                "shown": classify(pixels.to_uint8(video), scene.rgb).motion,
                "psnr": metrics.psnr(video, truth),
                "psnr_unskipped": metrics.psnr(video, reference) if video is not reference else None,
                "ssim_unskipped": metrics.ssim(video, reference),
            }
        )
    return rows


def _all_ways(full: Plan, judge: Judge, with_others: bool) -> list[SkippingWay]:
    return [*ways(full, judge), *(other_ways(full, judge) if with_others else [])]


def _key(plan: Plan) -> tuple[object, ...]:
    skipping = plan.config.skipping
    extrapolates = skipping is not None and skipping.magcache_extrapolate
    return plan.config.models, plan.levels, (*plan.guided,), (*plan.skips,), extrapolates


def summarise(results: list[list[dict[str, Any]]], judge: Judge, *, with_others: bool) -> list[dict[str, Any]]:
    """Returns rows of metrics; each metric is averaged over all held-out scenes.

    `results` holds, for each scene, the rows that `judged` returned. The first row of the result is for the videos
    without skipping. The next rows are for the plans of `ways`, and, if `with_others` is True, for those of
    `other_ways`. "skipped_forwards" is the number of forwards that a plan saves, compared with no skipping.
    """
    full = judge.plan_of(judge.config)
    found: list[dict[str, Any]] = []
    for number, way in enumerate((None, *_all_ways(full, judge, with_others))):
        rows = [result[number] for result in results]
        plan = way.plan if way else full
        saved = full.num_forwards - plan.num_forwards + sum(map(sum, plan.skips))
        compared = [row["psnr_unskipped"] for row in rows if row["psnr_unskipped"] is not None]
        found.append(
            {
                "settings": way.settings if way else "off",
                "plan": way.kind if way else None,
                "skipped_forwards": saved,
                "skipped_share": round(saved / full.num_forwards, 4),
                "accumulated_error": (magcache_json(plan) or {}).get("accumulated_error"),
                "psnr_unskipped": round(float(np.mean(compared)), 2) if compared else None,
                "ssim_unskipped": round(float(np.mean([row["ssim_unskipped"] for row in rows])), 4),
                "psnr": round(float(np.mean([row["psnr"] for row in rows])), 2),
                "prompt_following": share_right([row["asked"] for row in rows], [row["shown"] for row in rows]),
            }
        )
    return found


def plot(rows: list[dict[str, Any]], others: list[dict[str, Any]], file: Path) -> None:
    """Plots PSNR, SSIM and the share of videos that follow the prompt, over the share of saved forwards.

    PSNR and SSIM compare each video with the unskipped video. `rows`: the rows of `summarise` for no skipping and
    for the plans of `ways`. `others`: its rows for the plans of `other_ways`. `file`: the picture to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 3),
        (
            ("psnr_unskipped", "PSNR to the unskipped video, dB"),
            ("ssim_unskipped", "SSIM to the unskipped video"),
            ("prompt_following", "prompts followed"),
        ),
        strict=True,
    ):
        for rule, colour in (("low-noise-only", "tab:blue"), ("both-experts", "tab:orange")):
            for kind, mark in (("greedy", "o-"), ("least error", "x--"), ("extrapolated", "^:")):
                if chosen := _points(rows, name, kind, rule):
                    axes.plot(*zip(*chosen, strict=True), mark, color=colour, label=f"{rule}, {kind}")
        for kind, mark in (("no skips", "s"), ("least error", "x"), ("extrapolated", "^")):
            if chosen := _points(others, name, kind):
                axes.plot(*zip(*chosen, strict=True), mark, color="tab:green", label=f"gates, hybrid: {kind}")
        axes.set(xlabel="share of saved forwards", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _points(rows: list[dict[str, Any]], name: str, kind: str, ending: str = "") -> list[tuple[float, float]]:
    """Returns (share of saved forwards, metric `name`) of the rows of one kind whose settings have this ending."""
    return sorted(
        (row["skipped_share"], row[name]["share"] if name == "prompt_following" else row[name])
        for row in rows
        if row["plan"] == kind and row["settings"].endswith(ending)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--model", default="tiny", help="name or folder of a model; its MagCache curve must ship with wanfast"
    )
    parser.add_argument(
        "--only-magcache", action="store_true", help="measure neither --guidance-gate nor the recipe hybrid"
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write; the plot is written beside it")
    options = parser.parse_args()
    require_plotting(parser, options.output)
    files, with_others = model_files.locate(options.model, "artifacts"), not options.only_magcache
    if with_others and (missing := missing_lora(files, "hybrid", PAIR)):
        print(f"hybrid: left out, because {missing} is missing", flush=True)
    settings = Settings(options.model, files.spec.steps, files.spec.guidance_high_noise, "bf16")
    started = time.perf_counter()
    tasks = [(index, with_others) for index in range(options.pairs)]
    results = judge_all(judged, tasks, settings, options.processes, every=5)
    found = summarise(results, Judge(settings), with_others=with_others)
    rows, others = found[: 1 + 3 * len(SETTINGS)], found[1 + 3 * len(SETTINGS) :]
    for row in found:
        quality = f"PSNR {row['psnr_unskipped'] or 0:5.2f} dB, SSIM {row['ssim_unskipped']:.4f} to the unskipped video"
        right = f"{row['prompt_following']['right']} of {row['prompt_following']['of']} prompts"
        print(f"{row['settings']:34} {row['plan'] or '':12} {row['skipped_share']:6.1%} saved: {quality}; {right}")
    seconds = round(time.perf_counter() - started, 1)
    document = {"pairs": options.pairs, "rows": rows, "gates_and_hybrid": others, "seconds": seconds}
    document |= {"commit": commit(), "versions": versions()}
    if options.output is not None:
        write(document, options.output)
        plot(rows, others, options.output.with_suffix(".png"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
