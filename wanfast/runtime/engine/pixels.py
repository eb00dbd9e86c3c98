"""Pixels <-> tensors, with the reference's own rounding: bicubic without antialias in, truncation out.

Both are part of what the model was trained and is compared on. Source: Wan-Video/Wan2.2, wan/image2video.py and
wan/utils/utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def fit_image(image: Image, width: int, height: int) -> Tensor:
    """[3, height, width] fp32 on the CPU, 0..255 mapped to -1..1; bicubic overshoot beyond that is kept."""
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)
    return torch.nn.functional.interpolate(pixels_CHW[None], size=(height, width), mode="bicubic")[0]


def to_uint8(video: Tensor) -> npt.NDArray[np.uint8]:
    """video [3, F, H, W], clamped to [-1, 1] -> [F, H, W, 3] of 0..255, truncated and not rounded."""
    frames = video.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)
    array: npt.NDArray[np.uint8] = frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return array
