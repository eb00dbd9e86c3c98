"""Names the stages of a job, computes which share of a video is done, and types the callbacks that report progress.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Progress = tuple[str, int, int]  # (stage, steps done, of all steps)
StageFn = Callable[[str, int, int], None]  # takes the progress of one video
ProgressFn = Callable[[int, str, int, int], None]  # (job, stage, steps done, of all steps)
ResultFn = Callable[[int, dict[str, Any]], None]  # (job, its document, or its error)

LOADING = "loading the models"  # the stage of a rank group's progress before it can make a video
_CLIP = re.compile(r"clip (\d+) of (\d+), ")  # before the stages of a clip, whose steps begin at 0 again


def stage_of_clip(number: int, num_clips: int, stage: str) -> str:
    """Returns the name of stage `stage` of clip `number`, counted from 1; for a video of one clip, returns `stage`."""
    return f"clip {number} of {num_clips}, {stage}" if num_clips > 1 else stage


def share_done(stage: str, done: int, total: int) -> float:
    """Returns the share of a video's steps that is done, from 0 to 1.

    The arguments are those of `steps_left`. The clips before the current clip count as done.
    """
    number, num_clips = clip_of(stage)
    return (number - 1 + (done / total if total else 0)) / num_clips


def steps_left(stage: str, done: int, total: int) -> int:
    """Returns the number of steps that a video still needs, including the steps of its later clips.

    `stage`: the name of the current stage, which also tells the current clip. `done`: the finished steps of this clip.
    `total`: all steps of this clip.
    """
    number, num_clips = clip_of(stage)
    return (num_clips - number) * total + total - done


def clip_of(stage: str) -> tuple[int, int]:
    """Returns the clip that a stage's name mentions, and the number of clips: (2, 3) for "clip 2 of 3, decode".

    Clips are counted from 1. Returns (1, 1) if the name mentions no clip.
    """
    found = _CLIP.match(stage)
    return (int(found[1]), int(found[2])) if found else (1, 1)
