"""Measures what lossy attention costs on the tiny model; `make tiny-attention` runs this module.

For each held-out pair of image and prompt, one video is made with dense attention, and one with each kind of lossy
attention. All videos of a pair have the same seed. Sparse attention has three kinds, at several densities:

* "uniform": all heads have the given density, in all calls of self-attention.
* "calibrated": each head has its own density, from a calibration on the clips that ship for
  `wanfast calibrate-attention`. The target error of the calibration is the smallest one with which
  "calibrated" computes at most as many blocks as "uniform".
* "uniform, guarded": as "uniform", but the first steps and the first layers stay dense.

Float8 has two kinds. "fp8" subtracts v's mean before quantization, and "fp8 with v's mean" does not.
Each video is compared with the video of dense attention (PSNR, SSIM). In each lossy call, the outputs of some queries
are compared with exact outputs (the sampled error). The tracker classifies the motion of each video. The command writes
JSON and plots quality over density. For each kind of attention, the JSON also says whether a recipe may use it. The
module `quality.gate` has the rule.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from wanfast.attention_calib import calibrate
from wanfast.attention_calib.choice import chosen
from wanfast.magcache_calib.clips import Clip, read_set, shipped_set
from wanfast.quality import metrics
from wanfast.quality.gate import gate
from wanfast.quality.tiny import Judge, Settings, judge_all, require_plotting, share_right, write
from wanfast.quality.tracking import classify
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine.fp8_attention import Fp8Attention
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.errors import from_failure
from wanfast.runtime.facts.choices import Attention
from wanfast.runtime.facts.densities import Densities, bands_of
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import sparsity_json
from wanfast.runtime.store import model_files

SIDE, FRAMES = 256, 33  # 2,304 tokens, 18 blocks
DENSITIES = (0.25, 0.35, 0.5, 0.75)
_ALL_CALLS = {"dense_share": 0.0, "dense_layers": 0}
_SPARSE = {"attention": "sparse", "density": 1.0, "attention_check": True}

Kind = Literal["dense", "uniform", "calibrated", "uniform, guarded", "fp8", "fp8 with v's mean"]


@dataclass(frozen=True)
class AttentionWay:
    """Holds one way to compute self-attention: the options whose values differ from those of dense attention."""

    kind: Kind
    options: dict[str, Any]
    densities: Densities | None = None  # of a calibrated plan
    target_error: float | None = None  # of its calibration

    def plan(self, judge: Judge, index: int) -> Plan:
        """Returns the plan by which a video is made from held-out pair number `index` (an image and a prompt)."""
        config = judge.config.replace(seed=index, **self.options)
        return Plan.of(config, judge.files.spec, (SIDE, SIDE), densities=self.densities)


DENSE = AttentionWay("dense", {})


def ways(judge: Judge, measured: Sequence[dict[str, Any]]) -> list[AttentionWay]:
    """Returns the kinds of attention that are compared: dense, then sparse at several densities, then float8.

    `measured` holds the results of `measure`, one for each clip of the calibration.
    """
    steps = judge.settings.steps
    found = [DENSE]
    for density in DENSITIES:
        uniform = AttentionWay("uniform", {**_SPARSE, **_ALL_CALLS, "density": density})
        found += [uniform, of_equal_cost(uniform, judge, measured)]
    found += [AttentionWay("uniform, guarded", {**_SPARSE, "density": density}) for density in DENSITIES]
    in_fp8 = {"attention": "fa3-fp8", "fp8_steps": f"0:{steps}", "attention_check": True}
    return [*found, AttentionWay("fp8", in_fp8), AttentionWay("fp8 with v's mean", in_fp8)]


def of_equal_cost(uniform: AttentionWay, judge: Judge, measured: Sequence[dict[str, Any]]) -> AttentionWay:
    """Returns calibrated sparse attention that computes at most as many blocks as the sparse attention `uniform`.

    The target error of its calibration is the smallest one that keeps this limit. `measured` holds the results of
    `measure`, one for each clip of the calibration.
    """
    plan = uniform.plan(judge, 0)
    assert plan.sparsity is not None

    def of_target(target: float) -> Densities:
        by_band = chosen([*measured], target, fp8=False)["densities"]
        return Densities(bands=bands_of(plan.experts), by_band=tuple(tuple(map(tuple, layers)) for layers in by_band))

    def saved(target: float) -> float:
        sparsity = dataclasses.replace(plan, densities=of_target(target)).sparsity
        assert sparsity is not None
        return -sparsity.density

    targets = np.unique(chosen([*measured], 1.0, fp8=False)["errors"]).tolist()
    target = targets[bisect.bisect_left(targets, -plan.sparsity.density, hi=len(targets) - 1, key=saved)]
    return dataclasses.replace(uniform, kind="calibrated", densities=of_target(target), target_error=target)


@torch.inference_mode()
def measure(judge: Judge, clip: Clip) -> dict[str, Any]:
    """Denoises a calibration clip with dense attention, and returns the errors that lossy attention would cause.

    The result is the dict that `attention_calib.calibrate.measure` returns.
    """
    with tempfile.TemporaryDirectory() as folder:  # of text embeddings
        options = {**_SPARSE, **_ALL_CALLS, **clip.options, "artifacts_dir": folder}
        config = judge.config.replace(**options, image_sha256=clip.image_sha256)
        job = Plan.of(config, judge.files.spec, clip.image_size).job()
        ((_, result),) = calibrate.run([job], Sessions(judge.pipeline.ranks))
    if "error" in result:
        raise from_failure(result)
    return result


@cache
def _pipeline(judge: Judge, attention: Attention) -> VideoPipeline:
    return judge.load(judge.config.replace(**({**_SPARSE} if attention == "sparse" else {"attention": attention})))


@torch.inference_mode()
def judged(judge: Judge, task: tuple[int, list[AttentionWay]]) -> list[dict[str, Any]]:
    """Makes the video of a held-out scene once with each kind of attention, and returns the metrics of each video.

    `task`: (the index of the scene, the kinds of attention). The first kind must be dense, because all videos are
    compared with the first video.
    """
    index, all_ways = task
    scene, truth = judge.held_out(index)
    reference, rows = None, []
    for way in all_ways:
        pipeline = judge.pipeline if way is all_ways[0] else _pipeline(judge, way.options["attention"])
        if isinstance(pipeline.lossy, Fp8Attention):
            pipeline.lossy.centres_v = way.kind != "fp8 with v's mean"
        video = judge.by_plan(pipeline, way.plan(judge, index), scene.caption, truth[:, 0])
        reference = video if reference is None else reference
        errors = pipeline.lossy.report() if pipeline.lossy else None
        rows.append(
            {
                "asked": scene.motion,
                "shown": classify(pixels.to_uint8(video), scene.rgb).motion,
                "psnr": metrics.psnr(video, truth),
                "psnr_dense": metrics.psnr(video, reference) if video is not reference else None,
                "ssim_dense": metrics.ssim(video, reference),
                "error": {name: errors[name] for name in ("mean", "largest")} if errors else None,
            }
        )
    return rows


def summarise(results: list[list[dict[str, Any]]], all_ways: list[AttentionWay], judge: Judge) -> list[dict[str, Any]]:
    """Returns one row of metrics for each kind of attention in `all_ways`; a row covers all held-out scenes.

    `results` holds, for each scene, the metrics that `judged` returned.
    """
    rows = [
        _row(way, [result[number] for result in results], judge) | _paired(results, number, way)
        for number, way in enumerate(all_ways)
    ]
    return [row | {"gate": gate(row, rows[0]) if row is not rows[0] else None} for row in rows]


def _row(way: AttentionWay, rows: list[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    sparsity = sparsity_json(way.plan(judge, 0))
    errors = [row["error"] for row in rows if row["error"]]
    compared = [row["psnr_dense"] for row in rows if row["psnr_dense"] is not None]
    ssims = [row["ssim_dense"] for row in rows]
    return {
        "way": way.kind,
        "asked_density": way.options.get("density"),
        "density": sparsity["mean_density"] if sparsity else None,
        "target_error": way.target_error and round(way.target_error, 4),
        "mean_error": round(float(np.mean([error["mean"] for error in errors])), 4) if errors else None,
        "largest_error": max(error["largest"] for error in errors) if errors else None,
        "psnr_dense": round(float(np.mean(compared)), 2) if compared else None,
        "ssim_dense": round(float(np.mean(ssims)), 4),
        "ssim_dense_least": round(min(ssims), 4),
        "psnr": round(float(np.mean([row["psnr"] for row in rows])), 2),
        "prompt_following": share_right([row["asked"] for row in rows], [row["shown"] for row in rows]),
    }


def _paired(results: list[list[dict[str, Any]]], number: int, way: AttentionWay) -> dict[str, Any]:
    """Returns, for a calibrated way, in how many pairs it is better than the uniform way before it."""
    if way.kind != "calibrated":
        return {}
    pairs = [(result[number], result[number - 1]) for result in results]
    psnrs = np.array([own["psnr_dense"] - other["psnr_dense"] for own, other in pairs])
    return {
        "against_uniform": {
            "pairs": len(pairs),
            "lower_error": sum(own["error"]["mean"] < other["error"]["mean"] for own, other in pairs),
            "higher_psnr": int((psnrs > 0).sum()),
            "higher_ssim": sum(own["ssim_dense"] > other["ssim_dense"] for own, other in pairs),
            "psnr_gain": round(float(psnrs.mean()), 2),
        }
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots PSNR, SSIM and the sampled error of attention over the mean density of the video.

    `rows`: the result of `summarise`. `file`: the picture to write. Float8 has no density, so its values are drawn as
    horizontal lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 3),
        (
            ("psnr_dense", "PSNR to dense attention, dB"),
            ("ssim_dense", "SSIM to dense attention"),
            ("mean_error", "sampled relative error"),
        ),
        strict=True,
    ):
        for kind, mark in (("uniform", "o-"), ("calibrated", "x--"), ("uniform, guarded", "^:")):
            points = sorted((row["density"], row[name]) for row in rows if row["way"] == kind)
            axes.plot(*zip(*points, strict=True), mark, label=kind)
        for row, style in zip([row for row in rows if row["way"].startswith("fp8")], ("-.", ":"), strict=True):
            axes.axhline(row[name], color="tab:gray", linestyle=style, label=row["way"])
        axes.set(xlabel="mean density of the video", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file to write; a PNG file with the plot is written beside it"
    )
    options = parser.parse_args()
    require_plotting(parser, options.output)
    started = time.perf_counter()
    spec = model_files.locate(options.model, "artifacts").spec
    settings = Settings(options.model, options.steps, spec.guidance_high_noise, "bf16", side=SIDE, frames=FRAMES)
    all_judged = partial(judge_all, settings=settings, processes=options.processes, every=1)
    measured = all_judged(measure, read_set(shipped_set(spec), seed=0))
    judge = Judge(settings)
    all_ways = ways(judge, measured)
    results = all_judged(judged, list(zip(range(options.pairs), [all_ways] * options.pairs, strict=True)))
    document = {
        "model": spec.name,
        "weights": judge.files.fingerprints,
        "pairs": options.pairs,
        "steps": options.steps,
        "calibration_clips": len(measured),
        "rows": summarise(results, all_ways, judge),
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {options.processes} processes",
        "commit": commit(),
        "versions": versions(),
    }
    if options.output is not None:
        write(document, options.output)
        plot(document["rows"], options.output.with_suffix(".png"))
    print(json.dumps({name: value for name, value in document.items() if name != "results"}))


if __name__ == "__main__":
    main()
