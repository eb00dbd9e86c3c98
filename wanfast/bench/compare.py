"""Compares each recipe's videos with those of the first recipe, and judges whether each video follows its prompt.

A recipe's PSNR is computed from the mean squared error over all clips. If all videos of a recipe are equal bit for bit
to those of the first recipe, the recipe's quality has "psnr": None and "identical": True.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.bench.frames import read_frames
from wanfast.quality import metrics
from wanfast.quality.tracking import classify
from wanfast.quality.world import COLOURS, read_caption

Quality = dict[str, Any]


def compared(
    videos: dict[str, list[str]], base: str, prompts: Sequence[str], is_judged: bool, device: str
) -> dict[str, Quality]:
    """Compares each recipe's videos with the videos of the recipe `base`, and returns {recipe: quality}.

    `videos` is {recipe: files}. Each recipe has one file for each prompt, in the order of `prompts`; `write_frames`
    wrote these files. A quality is a dict of metrics over all videos of a recipe, such as "psnr" and "ssim". The
    metrics are computed on `device`.
    If `is_judged` is true, `compared` also counts the videos that show the motion of their prompt. Pass True only for
    the tiny model, because the motions of other models' videos cannot be recognised.
    """
    found: dict[str, list[Quality]] = {name: [] for name in videos}
    for clip, prompt in enumerate(prompts):
        reference = _tensor(read_frames(Path(videos[base][clip])), device)
        for name, files in videos.items():
            frames = read_frames(Path(files[clip]))
            is_right = _follows(frames, prompt) if is_judged else None
            found[name].append(_quality(_tensor(frames, device), reference) | {"is_right": is_right})
    return {name: _averaged(of_clips) for name, of_clips in found.items()}


def _tensor(frames: npt.NDArray[Any], device: str) -> Tensor:
    return torch.from_numpy(frames).to(device).permute(3, 0, 1, 2).float() / 127.5 - 1


def _follows(frames: npt.NDArray[Any], prompt: str) -> bool | None:
    """Returns whether frames show the motion that a caption names; None if the prompt is no such caption."""
    asked = read_caption(prompt)
    return None if asked is None else classify(frames, COLOURS[asked[0]]).motion == asked[1]


def _quality(video: Tensor, reference: Tensor) -> Quality:
    return {
        "mean_squared_error": 10 ** (-metrics.psnr(video, reference) / 10),
        "ssim": metrics.ssim(video, reference),
        "ms_ssim": metrics.ms_ssim(video, reference),
        "flicker": metrics.flicker(video),
        "motion": metrics.motion(video),
    }


def _averaged(of_clips: list[Quality]) -> Quality:
    errors = [quality["mean_squared_error"] for quality in of_clips]
    error = fmean(errors)
    judged = [quality["is_right"] for quality in of_clips if quality["is_right"] is not None]
    means = {name: fmean(quality[name] for quality in of_clips) for name in ("ssim", "ms_ssim", "flicker", "motion")}
    return {
        "psnr": _decibels(error),  # a mean of the clips' PSNRs would be infinite if one clip had no error
        "psnr_by_clip": [_decibels(of_clip) for of_clip in errors],
        "identical": error == 0,
        **{name: round(mean, 4) for name, mean in means.items()},
        "prompt_following": {"right": sum(judged), "of": len(judged)} if judged else None,
    }


def _decibels(error: float) -> float | None:
    return round(-10 * math.log10(error), 2) if error else None
