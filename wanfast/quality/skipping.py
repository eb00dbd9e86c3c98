"""Measures what MagCache saves and costs on the tiny model; `make tiny-magcache` runs this module.

Held-out pairs of image and prompt go through the pipeline without skipping, and then with every setting of MagCache.
Each setting makes three videos. The first video follows the greedy plan, which skips until the error reaches a
threshold. The second video follows the least-error plan: it skips as many forwards as the greedy plan, within the same
limits, but with the least accumulated error. The third video follows the least-error plan too, but extrapolates the
residuals of skipped forwards. Each video is compared with the unskipped video (PSNR, SSIM) and with the true clip
(PSNR), and the tracker classifies the video's motion. The command writes JSON and plots quality over the share of
skipped forwards.
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
from wanfast.quality.tiny import Judge, Settings, judge_all, require_plotting, share_right, write
from wanfast.quality.tracking import classify
from wanfast.quality.world import SIZE
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


@dataclass(frozen=True)
class SkippingWay:
    """Holds one way to skip forwards: a setting of MagCache, a kind of plan, and the plan.

    The setting has two parts. `rule` is the value of --magcache-rule. `name` gives the limits: E012K2R20 means
    threshold 0.12, at most 2 skips in a row, retention ratio 0.2.
    """

    rule: MagCacheRule
    name: str
    kind: Literal["greedy", "least error", "extrapolated"]
    plan: Plan


def ways(full: Plan, judge: Judge) -> list[SkippingWay]:
    """Returns three `SkippingWay` objects for each setting.

    The first has the greedy plan. The second has the least-error plan with the same number of skips. The third has the
    same plan as the second, but with extrapolated residuals.
    """
    found = []
    for rule, name in SETTINGS:
        settings = magcache_settings(name)
        assert settings is not None
        threshold, max_skips, retention = settings
        limits = {"magcache": "preset", "magcache_k": max_skips, "retention_ratio": retention, "magcache_rule": rule}
        limits["magcache_joint"] = "off"  # as published
        config = full.config.replace(**limits, magcache_thresh=threshold)
        greedy = dataclasses.replace(full, config=config, curve=curve_of(config, judge.files))
        number = sum(map(sum, greedy.skips))
        best_config = config.replace(magcache_thresh=None, magcache_skip=number)
        best = dataclasses.replace(greedy, config=best_config)
        extrapolated = dataclasses.replace(best, config=best_config.replace(magcache_extrapolate=True))
        found += [
            SkippingWay(rule, name, "greedy", greedy),
            SkippingWay(rule, name, "least error", best),
            SkippingWay(rule, name, "extrapolated", extrapolated),
        ]
    return found


@torch.inference_mode()
def judged(judge: Judge, index: int) -> list[dict[str, Any]]:
    """Makes videos from one held-out scene, and returns a row of metrics for each video.

    The first row is for the video without skipping. Each other row is for one `SkippingWay`.
    """
    scene, truth = judge.held_out(index)
    full = Plan.of(judge.config.replace(seed=index), judge.files.spec, (SIZE, SIZE))
    reference = judge.by_plan(judge.pipeline, full, scene.caption, truth[:, 0])
    made = {_key(full): reference}  # plans that skip the same forwards in the same way make the same video
    rows = []
    for way in (None, *ways(full, judge)):
        plan = way.plan if way else full
        key = _key(plan)
        if key not in made:
            made[key] = judge.by_plan(judge.pipeline, plan, scene.caption, truth[:, 0])
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


def _key(plan: Plan) -> tuple[object, ...]:
    skipping = plan.config.skipping
    return (*plan.skips, skipping is not None and skipping.magcache_extrapolate)


def summarise(results: list[list[dict[str, Any]]], judge: Judge) -> list[dict[str, Any]]:
    """Returns rows of metrics; each metric is averaged over all held-out scenes.

    The first row is for the videos without skipping. Each other row is for one `SkippingWay`.
    """
    full = Plan.of(judge.config, judge.files.spec, (SIZE, SIZE))
    found: list[dict[str, Any]] = []
    for number, way in enumerate((None, *ways(full, judge))):
        rows = [result[number] for result in results]
        plan = (way and magcache_json(way.plan)) or {"skipped_forwards": 0, "skipped_share": 0.0}
        compared = [row["psnr_unskipped"] for row in rows if row["psnr_unskipped"] is not None]
        found.append(
            {
                "settings": f"{way.name}, {way.rule}" if way else "off",
                "plan": way.kind if way else None,
                "skipped_forwards": plan["skipped_forwards"],
                "skipped_share": plan["skipped_share"],
                "accumulated_error": plan.get("accumulated_error"),
                "psnr_unskipped": round(float(np.mean(compared)), 2) if compared else None,
                "ssim_unskipped": round(float(np.mean([row["ssim_unskipped"] for row in rows])), 4),
                "psnr": round(float(np.mean([row["psnr"] for row in rows])), 2),
                "prompt_following": share_right([row["asked"] for row in rows], [row["shown"] for row in rows]),
            }
        )
    return found


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots PSNR, SSIM and the share of videos that follow the prompt, over the share of skipped forwards.

    PSNR and SSIM compare each video with the unskipped video.
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
                chosen = sorted(
                    (row["skipped_share"], row[name]["share"] if name == "prompt_following" else row[name])
                    for row in rows
                    if row["plan"] == kind and row["settings"].endswith(rule)
                )
                if chosen:
                    axes.plot(*zip(*chosen, strict=True), mark, color=colour, label=f"{rule}, {kind}")
        axes.set(xlabel="share of skipped forwards", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file; a PNG file with the plot is written beside it"
    )
    options = parser.parse_args()
    require_plotting(parser, options.output)
    spec = model_files.locate("tiny", "artifacts").spec
    settings = Settings("tiny", spec.steps, spec.guidance_high_noise, "bf16")
    started = time.perf_counter()
    results = judge_all(judged, range(options.pairs), settings, options.processes, every=5)
    rows = summarise(results, Judge(settings))
    for row in rows:
        quality = f"PSNR {row['psnr_unskipped'] or 0:5.2f} dB, SSIM {row['ssim_unskipped']:.4f} to the unskipped video"
        right = f"{row['prompt_following']['right']} of {row['prompt_following']['of']} prompts"
        print(f"{row['settings']:30} {row['plan'] or '':12} {row['skipped_share']:6.1%} skipped: {quality}; {right}")
    seconds = round(time.perf_counter() - started, 1)
    document = {"pairs": options.pairs, "rows": rows, "seconds": seconds, "commit": commit(), "versions": versions()}
    if options.output is not None:
        write(document, options.output)
        plot(rows, options.output.with_suffix(".png"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
