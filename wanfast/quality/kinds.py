"""Measures videos with a given last image, and videos of several clips; `make tiny-kinds` runs this module.

The model must be trained with last images. With `--photographs`, it must also be trained with photographs.

For each held-out scene, the true clip is drawn, and the model makes two videos from the clip's first frame. The first
video also gets the clip's last frame, as its last image. The second video, the control, gets no last image. The figures
say how near the last frame of each video comes to the clip's last frame.

For each chain, four clips with one prompt are made and joined as `wanfast generate` joins them. A seam is the place
where two clips meet. The figures say:

* how many videos have smooth seams: the mean change from frame to frame at the seams is at most the 95th percentile of
  the changes inside the clips;
* the same by motion, because still videos can jump while the mean over all motions is smooth;
* at how many seams the motion goes on;
* how far the mean and the standard deviation of the colours drift from those of the first clip.

Chains with a moving shape use only shapes that circle, spin or stand still, because these stay in the frame. If the
camera moves, later clips show other things, so their colours change even without drift. Therefore, the drift of the
videos whose prompt asks for no motion is also stated separately.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.quality import metrics, tracking
from wanfast.quality.camera import CAMERAS
from wanfast.quality.motions import MOTIONS, PathFn
from wanfast.quality.tiny import (
    Judge,
    Mover,
    Settings,
    asked,
    figures_of_last,
    judge_all,
    movers_of,
    parser_of,
    settings_of,
    share_of,
    share_right,
    shown,
    write,
)
from wanfast.quality.world import Scene, draw_scene
from wanfast.runtime.device import hardware
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine.pixels import Frames
from wanfast.runtime.jobs.generate import Joined
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.store import model_files

Vector = npt.NDArray[np.float64]
CLIPS = 4
_LASTING = ("circle", "spin", "still")  # motions of a shape that stays in the frame, however often they are repeated
_REACH = 2  # frames on each side of a seam in which the motion is followed
_LEAST_SPEED = 0.25  # of the motion that the prompt asks for: a slower one has stopped
_LEAST_COSINE = 0.5  # of the angle between the direction after a seam and the one expected there: 60 degrees


@dataclass(frozen=True)
class KindTask:
    """Names a held-out scene, and says what is made of it: a video between two images, or a chain of clips."""

    kind: Literal["between", "chain"]
    mover: Mover
    index: int


@torch.inference_mode()
def judged(judge: Judge, task: KindTask) -> dict[str, Any]:
    """Makes the videos of a task, and returns their metrics."""
    scene, truth = judge.held_out(task.index, task.mover)
    measured = _between(judge, task, scene, truth) if task.kind == "between" else _chain(judge, task, scene, truth)
    return {**vars(task), "asked": asked(task.mover, scene), **measured}


def _between(judge: Judge, task: KindTask, scene: Scene, truth: Tensor) -> dict[str, Any]:
    """Makes a video with the last image and one without; both have the same first image, prompt and noise."""
    with_last, without = (_video(judge, task.index, scene, truth[:, 0], last) for last in (truth[:, -1], None))
    return {
        "psnr": metrics.psnr(with_last[:, -1:], truth[:, -1:]),
        "psnr_without": metrics.psnr(without[:, -1:], truth[:, -1:]),
        "shown": shown(task.mover, scene, pixels.to_uint8(with_last)),
    }


def _chain(judge: Judge, task: KindTask, scene: Scene, truth: Tensor) -> dict[str, Any]:
    """Makes clips that start from the frame before, with seeds that follow, and joins them."""
    frames: list[pixels.Frame] = []
    round_trips = []
    joined = Joined(frames.extend)
    for clip in range(CLIPS):
        start = joined.begin_clip()
        image = truth[:, 0] if start is None else pixels.of_decoded(start)
        if start is not None:
            round_trips.append(_round_trip(judge, image))
        joined.add(pixels.to_uint8(_video(judge, task.index + clip, scene, image)))
    return {**chain_figures(np.stack(frames), task.mover, scene), "round_trips": round_trips}


def _round_trip(judge: Judge, image: Tensor) -> float:
    """Returns by how much, in units of 1/255, the VAE changes an image [3, H, W] that it encodes and decodes."""
    vae, given = judge.pipeline.vae, image[:, None]
    decoded = vae.decode(vae.encode(given[None].to(judge.settings.device)))[0]
    before, after = (pixels.to_uint8(video).astype(np.int16) for video in (given, decoded))
    return float(np.abs(after - before).mean())


def _video(judge: Judge, seed: int, scene: Scene, image: Tensor, last: Tensor | None = None) -> Tensor:
    plan = judge.plan_of(judge.config.replace(seed=seed))
    return judge.by_plan(judge.pipeline, plan, scene.caption, image, last=last)


def chain_figures(frames: Frames, mover: Mover, scene: Scene) -> dict[str, Any]:
    """Returns the metrics of a chain's joined frames [CLIPS * n + 1, H, W, 3].

    Each clip has n + 1 frames, because neighbouring clips share one frame.
    """
    steps = (len(frames) - 1) // CLIPS  # from one seam to the next
    seams = [steps * clip for clip in range(1, CLIPS)]
    differences = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)).tolist()
    clips = [frames[steps * clip : steps * (clip + 1) + 1] for clip in range(CLIPS)]
    around = [frames[seam - _REACH : seam + _REACH + 1] for seam in seams]
    return {
        "seams": [differences[seam] for seam in seams],
        "inside": [difference for at, difference in enumerate(differences) if at not in seams],
        "goes_on": [goes_on(window, mover, scene, _REACH / steps) for window in around],
        "shown": [shown(mover, scene, clip) for clip in clips],
        "colours": [_colours(clip[1:]) for clip in clips],  # without the frame that two clips share
    }


def goes_on(window: Frames, mover: Mover, scene: Scene, share: float) -> bool | None:
    """Returns whether the motion before the middle frame of `window` goes on after the middle frame.

    `window` [2 * n + 1, H, W, 3] has n frames on each side of the middle frame. `share`: the duration of n frames,
    divided by the duration of a clip.
    The motion goes on if two conditions hold. Before and after the middle frame, the speed is at least a quarter of the
    speed that the prompt asks for. The direction after it differs by at most 60 degrees from the direction before it,
    turned as the motion that the prompt asks for turns there: a circle turns by 45 degrees between these windows.
    Returns None if the prompt asks for no motion, and False if the motion cannot be followed in the frames.
    """
    known, tolerance = _judge_of(mover, scene)
    start, end = (known([at, at + share]) / tolerance for at in (0.0, 1.0 - share))
    leaving, arriving = start[1] - start[0], end[1] - end[0]
    asked = float(np.linalg.norm(leaving))
    if asked == 0:
        return None
    path = _followed(window, mover, scene)
    if path is None:
        return False
    middle = len(path) // 2
    before, after = (path[middle] - path[0]) / tolerance, (path[-1] - path[middle]) / tolerance
    speeds = float(np.linalg.norm(before)), float(np.linalg.norm(after))
    expected = turned(before, arriving, leaving)
    return min(speeds) >= _LEAST_SPEED * asked and float(expected @ after) >= _LEAST_COSINE * speeds[0] * speeds[1]


def turned(v: Vector, before: Vector, after: Vector) -> Vector:
    """Returns v, turned by the rotation that turns the direction of `before` into that of `after` and nothing else.

    The two directions must not be opposite.
    """
    a, b = before / np.linalg.norm(before), after / np.linalg.norm(after)
    both: Vector = v - (a + b) * ((a + b) @ v) / (1 + a @ b) + 2 * b * (a @ v)
    return both


def _judge_of(mover: Mover, scene: Scene) -> tuple[PathFn, npt.NDArray[np.float64]]:
    """Returns (the path of the motion that the scene's prompt asks for, the tolerance of this motion's judge)."""
    if mover == "shape":
        return MOTIONS[asked(mover, scene)].at, tracking.TOLERANCE
    from wanfast.quality import registration  # needs OpenCV, and only photographs need this module

    return CAMERAS[asked(mover, scene)].at, registration.TOLERANCE


def _followed(frames: Frames, mover: Mover, scene: Scene) -> npt.NDArray[np.float64] | None:
    if mover == "shape":
        return tracking.track(frames, scene.rgb)
    from wanfast.quality import registration

    return registration.follow(frames)


def _colours(frames: Frames) -> list[list[float]]:
    """Returns [mean, standard deviation], each as [red, green, blue] in units of 1/255."""
    return [frames.mean(axis=(0, 1, 2)).tolist(), frames.std(axis=(0, 1, 2)).tolist()]


def summarise(results: list[dict[str, Any]], settings: Settings, seconds: float) -> dict[str, Any]:
    """Returns the document that the command prints: the figures of all videos, and how they were measured.

    "between" holds the figures of videos with a given last image, and "chains" the figures of videos of several clips.
    Both are {"shape": figures of the videos with a moving shape, "camera": figures of those with a moving camera}.
    """

    def of(kind: str, mover: Mover) -> list[dict[str, Any]]:
        return [row for row in results if (row["kind"], row["mover"]) == (kind, mover)]

    movers = movers_of(settings)
    return {
        "settings": vars(settings),
        "between": {mover: _figures_between(rows) for mover in movers if (rows := of("between", mover))},
        "clips": CLIPS,
        "chains": {mover: _figures_of_chains(rows) for mover in movers if (rows := of("chain", mover))},
        "seconds": round(seconds, 1),
        "weights": model_files.locate(settings.model, "artifacts").fingerprints,
        "hardware": hardware.describe(settings.device),
        "commit": commit(),
        "versions": versions(),
    }


def _figures_between(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "given": figures_of_last([row["psnr"] for row in rows]),
        "not_given": figures_of_last([row["psnr_without"] for row in rows]),
        "prompt_following": share_right([row["asked"] for row in rows], [row["shown"] for row in rows]),
    }


def _figures_of_chains(rows: list[dict[str, Any]]) -> dict[str, Any]:
    moving = [verdict for row in rows for verdict in row["goes_on"] if verdict is not None]
    return {
        "videos": len(rows),
        "difference": _difference(rows),
        "smooth_videos": share_of([_is_smooth(row) for row in rows]),
        "seams_by_motion": _seams_by_motion(rows),
        "motion_goes_on": share_of(moving) if moving else None,
        "motion_goes_on_by_motion": _by_motion(rows),
        "prompt_following": [
            share_right([row["asked"] for row in rows], [row["shown"][clip] for row in rows]) for clip in range(CLIPS)
        ],
        "drift": _drift(rows),
        "drift_of_still_videos": _drift([row for row in rows if row["asked"] == "still"]),
    }


def _difference(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean differences of neighbouring frames at the seams and inside the clips, in units of 1/255.

    "round_trip" is the mean difference of the shared frames to themselves, after the VAE has encoded and decoded them.
    """
    names = ("inside", "seams", "round_trips")
    inside, seams, round_trips = (np.concatenate([row[name] for row in rows]) for name in names)
    return {
        "seams": round(float(seams.mean()), 3),
        "inside": round(float(inside.mean()), 3),
        "inside_95%": round(float(np.percentile(inside, 95)), 3),
        "round_trip": round(float(round_trips.mean()), 3),
    }


def _is_smooth(row: dict[str, Any]) -> bool:
    """Returns whether a video changes at its seams as inside its clips, in which few changes are larger."""
    return bool(np.mean(row["seams"]) <= np.percentile(row["inside"], 95))


def _seams_by_motion(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns {motion: {"smooth_videos": [videos with smooth seams, videos], and its differences}}.

    Videos of one motion can be rough at their seams while the mean over all motions is smooth.
    """
    by_motion = {name: [row for row in rows if row["asked"] == name] for name in sorted({row["asked"] for row in rows})}
    return {
        name: {"smooth_videos": [sum(map(_is_smooth, own)), len(own)], **_difference(own)}
        for name, own in by_motion.items()
    }


def _by_motion(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Returns {motion: [seams over which it goes on, seams]}."""
    found: dict[str, list[int]] = {}
    for row in rows:
        for verdict in row["goes_on"]:
            if verdict is not None:
                right, of = found.get(row["asked"], [0, 0])
                found[row["asked"]] = [right + verdict, of + 1]
    return found


def _drift(rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Returns, for each clip after the first, how far its colours are from the first clip's; None without videos.

    "mean" and "deviation" are [red, green, blue] in units of 1/255, averaged over the videos with their signs.
    "mean_size" and "deviation_size" are averaged without their signs.
    """
    if not rows:
        return None
    colours = np.array([row["colours"] for row in rows])  # [videos, CLIPS, mean or deviation, channels]
    drift = colours[:, 1:] - colours[:, :1]
    found = []
    for of_clip, size in zip(drift.mean(axis=0), np.abs(drift).mean(axis=0), strict=True):
        named = {"mean": of_clip[0], "deviation": of_clip[1], "mean_size": size[0], "deviation_size": size[1]}
        found.append({name: np.round(values, 2).tolist() for name, values in named.items()})
    return found


def tasks_of(pairs: int, chains: int, movers: tuple[Mover, ...]) -> list[KindTask]:
    """Returns, for each mover, as many tasks "between" as `pairs` says, and as many tasks "chain" as `chains` says.

    `movers`: what moves in the scenes: "shape", "camera" or both. If a shape moves, chains use only scenes in which the
    shape stays in the frame during all clips.
    """
    tasks: list[KindTask] = []
    for mover in movers:
        chained = count() if mover == "camera" else filter(_lasts, count())
        tasks += [KindTask("between", mover, index) for index in range(pairs)]
        tasks += [KindTask("chain", mover, index) for index in islice(chained, chains)]
    return tasks


def _lasts(index: int) -> bool:
    return draw_scene(index, held_out=True, camera_share=0.0).motion in _LASTING


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--pairs",
        type=int,
        default=25,
        help="number of held-out scenes with a moving shape; two videos are made from each scene, with and without a "
        "last image; --photographs adds the same number of scenes with a moving camera",
    )
    parser.add_argument(
        "--chains",
        type=int,
        default=18,
        help=f"number of videos with a moving shape, each of {CLIPS} clips; --photographs adds the same number with a "
        "moving camera",
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    settings = settings_of(parser, options)
    tasks, started = tasks_of(options.pairs, options.chains, movers_of(settings)), time.perf_counter()
    results = judge_all(judged, tasks, settings, options.processes, every=10)
    summary = summarise(results, settings, time.perf_counter() - started)
    if options.output is not None:
        write(summary, options.output)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
