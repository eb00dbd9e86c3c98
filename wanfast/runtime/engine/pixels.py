"""This module converts pixels and tensors as the reference does: bicubic without antialias in, truncation out.

The model was trained with both, and is compared on both. Source: Wan-Video/Wan2.2, wan/image2video.py and
wan/utils/utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.runtime.facts.choices import ImageFit
from wanfast.runtime.facts.shapes import inner_size, middle_box

if TYPE_CHECKING:
    from PIL.Image import Image

_BLACK = -1.0


def fit_image(image: Image, width: int, height: int, fit: ImageFit = "area") -> Tensor:
    """Returns an image as [3, height, width] fp32 on the CPU, with 0..255 mapped to -1..1.

    `area` scales the whole image, whose shape the size has already. `crop` scales the middle part that has the size's
    shape. `pad` scales the whole image to fit inside, with black around it.
    """
    if fit == "crop":
        image = image.crop(middle_box(image.size, width, height))
    if fit != "pad":
        return _resized(image, width, height)
    inner_width, inner_height = inner_size(image.size, width, height)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    around = (left, width - inner_width - left, top, height - inner_height - top)
    return torch.nn.functional.pad(_resized(image, inner_width, inner_height), around, value=_BLACK)


def _resized(image: Image, width: int, height: int) -> Tensor:
    """Resizes to [3, height, width], and keeps bicubic overshoot."""
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)
    return torch.nn.functional.interpolate(pixels_CHW[None], size=(height, width), mode="bicubic")[0]


def to_uint8(video: Tensor) -> npt.NDArray[np.uint8]:
    """Maps video [3, F, H, W], clamped to [-1, 1], to [F, H, W, 3] of 0..255, truncated and not rounded."""
    frames = video.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)
    array: npt.NDArray[np.uint8] = frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return array
