"""Compares distilled weights with their teacher and with plain weights; `make tiny-few-steps` runs this module.

Plain weights are the model's own weights, without a LoRA. Distilled weights are plain weights into which a pair of
LoRAs is merged, one for each expert. A held-out scene, which training never shows, gives an image and a prompt. Six
videos are made from this image and prompt, all with the same seed:

* "teacher": plain weights, with all steps and with guidance.
* "student": distilled weights, with the options of a few-step recipe.
* "plain" and "plain, guided": plain weights, with as many steps and the same noise levels as the student.
* "plain, as --steps" and "plain, as --steps, guided": plain weights, with as many steps as the student, but with the
  noise levels that `--steps` gives.

Each video is compared with the teacher's video (PSNR, SSIM), and the video's first frame is compared with the image.
The motion of each video is classified. Each of the four videos of plain weights also has a paired PSNR: the student's
PSNR to the teacher, minus this video's PSNR to the teacher. A paired PSNR above 0 means that the student is nearer to
the teacher. The command prints a table and writes JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanfast.quality import metrics
from wanfast.quality.distilled import PAIR, distilled, missing_lora, undistilled
from wanfast.quality.tiny import (
    Judge,
    Mover,
    asked,
    judge_all,
    mean_of,
    movers_of,
    parser_of,
    settings_of,
    share_of,
    share_right,
    shown,
    write,
)
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.config.recipes import FEW_STEPS, RECIPES
from wanfast.runtime.device import hardware
from wanfast.runtime.engine import pixels
from wanfast.runtime.facts.choices import EXPERTS, RecipeName
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store import model_files

TEACHER, STUDENT = "teacher", "student"
RECIPES_OF_PAIRS = tuple(
    name for name in FEW_STEPS if RECIPES[name].distilled == EXPERTS and not RECIPES[name].num_images
)


@dataclass(frozen=True)
class FewStepsTask:
    """Identifies a held-out scene by its number and by what moves in it; `recipe` is the student's few-step recipe."""

    index: int
    mover: Mover
    recipe: RecipeName = PAIR


def configs(judge: Judge, recipe: RecipeName) -> dict[str, EffectiveConfig]:
    """Returns {name of a video: its config} for the six videos that the module's docstring lists.

    `recipe`: the student's few-step recipe.
    """
    teacher, same = judge.config, undistilled(judge.config, recipe)
    assert same.video.levels is not None
    as_spaced = teacher.replace(steps=len(same.video.levels))
    guided = {f"guidance_{expert}": judge.settings.guidance for expert in EXPERTS}
    unguided = {f"guidance_{expert}": 1.0 for expert in EXPERTS}
    return {
        TEACHER: teacher,
        STUDENT: distilled(teacher, recipe, judge.files, recipe),
        "plain": same,
        "plain, guided": same.replace(**guided),
        "plain, as --steps": as_spaced.replace(**unguided),
        "plain, as --steps, guided": as_spaced,
    }


def plans(judge: Judge, recipe: RecipeName, seed: int = 0) -> Iterator[tuple[str, Plan]]:
    """Yields (name, plan) of each of the six videos of `configs`, the teacher's first; all have the seed `seed`."""
    for name, config in configs(judge, recipe).items():
        yield name, judge.plan_of(config.replace(seed=seed))


@torch.inference_mode()
def judged(judge: Judge, task: FewStepsTask) -> dict[str, Any]:
    """Makes a video of the held-out scene of `task` with each config of the recipe, and measures the videos.

    Returns the fields of `task` and two more. "asked" is the motion that the prompt asks for. "ways" is {name of a
    config: measurements of its video}, and the measurement "shown" is the motion in the video.
    """
    scene, truth = judge.held_out(task.index, task.mover)
    teacher, ways = None, {}
    for name, plan in plans(judge, task.recipe, task.index):
        video = judge.by_plan(judge.pipeline_of(plan.config), plan, scene.caption, truth[:, 0])
        teacher = video if teacher is None else teacher
        ways[name] = {
            "shown": shown(task.mover, scene, pixels.to_uint8(video)),
            "first_frame_psnr": metrics.psnr(video[:, :1], truth[:, :1]),
            "psnr": metrics.psnr(video, truth),
            **(
                {"psnr_teacher": metrics.psnr(video, teacher), "ssim_teacher": metrics.ssim(video, teacher)}
                if name != TEACHER
                else {}
            ),
        }
    return {**vars(task), "asked": asked(task.mover, scene), "ways": ways}


def summarise(results: list[dict[str, Any]], forwards: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Returns {"shape": rows of the scenes with a moving shape, "camera": rows of the scenes with a moving camera}.

    Each of the six videos of `configs` has one row: in how many scenes the video follows the prompt, and the mean of
    each metric over the scenes. If no scene has a moving camera, the key "camera" is missing.
    `results`: the result of `judged` for each scene. `forwards`: {name of a video: the number of its forwards}.
    """
    movers = dict.fromkeys(result["mover"] for result in results)
    return {
        mover: [
            {"way": way, "forwards": number, **_figures([r for r in results if r["mover"] == mover], way)}
            for way, number in forwards.items()
        ]
        for mover in movers
    }


def _figures(results: list[dict[str, Any]], way: str) -> dict[str, Any]:
    rows = [result["ways"][way] for result in results]
    found = {
        "prompt_following": share_right([result["asked"] for result in results], [row["shown"] for row in rows]),
        "first_frame_psnr": round(float(np.mean([row["first_frame_psnr"] for row in rows])), 3),
        "psnr": round(float(np.mean([row["psnr"] for row in rows])), 3),
    }
    if way != TEACHER:
        found["psnr_teacher"] = mean_of([row["psnr_teacher"] for row in rows])
        found["ssim_teacher"] = round(float(np.mean([row["ssim_teacher"] for row in rows])), 4)
    if way not in (TEACHER, STUDENT):
        pairs = zip([result["ways"][STUDENT] for result in results], rows, strict=True)
        gains = [student["psnr_teacher"] - row["psnr_teacher"] for student, row in pairs]
        found["paired_psnr"] = mean_of(gains)
        found["student_nearer"] = share_of([gain > 0 for gain in gains])
    return found


def said(row: dict[str, Any]) -> str:
    """Returns a row of `summarise` as one line of the table that the command prints."""
    following = row["prompt_following"]
    text = f"{row['way']:26}{row['forwards']:3} forwards, {following['right']:3} of {following['of']} prompts, "
    text += f"first frame {row['first_frame_psnr']:.1f} dB"
    if "psnr_teacher" in row:
        text += f", PSNR to the teacher {row['psnr_teacher']['mean']:.2f} dB"
    if "paired_psnr" in row:
        mean, interval = row["paired_psnr"]["mean"], row["paired_psnr"]["95%"]
        low_to_high = f" (95 % interval {interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
        text += f"; the student is nearer by {mean:+.2f} dB{low_to_high}"
    return text


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--recipe",
        choices=RECIPES_OF_PAIRS,
        default=PAIR,
        help="few-step recipe with which the distilled weights make videos",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=100,
        help="number of held-out scenes with a moving shape; six videos are made from each scene; --photographs adds "
        "the same number of scenes with a moving camera",
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    settings = settings_of(parser, options)
    if missing := missing_lora(model_files.locate(settings.model, "artifacts"), options.recipe, options.recipe):
        parser.error(f"{missing} is missing: train the pair with `python -m training --stage lora`")
    movers, started = movers_of(settings), time.perf_counter()
    tasks = [FewStepsTask(index, mover, options.recipe) for mover in movers for index in range(options.pairs)]
    results = judge_all(judged, tasks, settings, options.processes, every=10)
    judge = Judge(settings)
    forwards = {name: plan.num_forwards for name, plan in plans(judge, options.recipe)}
    student = configs(judge, options.recipe)[STUDENT].models
    document = {
        "settings": vars(settings),
        "recipe": options.recipe,
        "lora_sha256": student.lora_sha256,
        "pairs": options.pairs,
        **summarise(results, forwards),
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware.describe(settings.device),
        "commit": commit(),
        "versions": versions(),
    }
    if options.output is not None:
        write(document, options.output)
    for mover in movers:
        print(f"what moves: the {mover}", *map(said, document[mover]), sep="\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
