"""This module converts an image to a tensor and a video tensor to pixels, as the reference does.

It resizes images by bicubic interpolation without antialiasing, and truncates pixel values instead of rounding them.
Source: Wan-Video/Wan2.2, wan/image2video.py and wan/utils/utils.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.engine.finite import require_finite
from wanfast.runtime.errors import WanFastError
from wanfast.runtime.facts.choices import ImageFit
from wanfast.runtime.facts.shapes import Geometry, inner_size, middle_box
from wanfast.runtime.models.vae import Rows

if TYPE_CHECKING:
    from PIL.Image import Image

Frame: TypeAlias = npt.NDArray[np.uint8]  # [H, W, 3]
Frames: TypeAlias = npt.NDArray[np.uint8]  # [F, H, W, 3]
FramesFn = Callable[[Frames], None]
_BLACK = -1.0


def fit_image(image: Image, width: int, height: int, fit: ImageFit = "area") -> Tensor:
    """Returns an image as [3, height, width] float32 on the CPU, with 0..255 mapped to -1..1.

    `fit` "area" scales the whole image; width and height must already have the image's aspect ratio. "crop" takes the
    largest centred part that has the aspect ratio width:height, and scales this part. "pad" scales the whole image to
    fit inside width x height, and adds black borders.
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
    return torch.nn.functional.interpolate(of_frame(np.array(image))[None], size=(height, width), mode="bicubic")[0]


def of_frame(frame_HWC: Frame) -> Tensor:
    """Returns a frame [H, W, 3] as [3, H, W] float32 on the CPU, with 0..255 mapped to -1..1."""
    return torch.from_numpy(frame_HWC).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def of_decoded(frame_HWC: Frame) -> Tensor:
    """Returns a frame [H, W, 3] that `to_uint8` made as [3, H, W] float32 on the CPU, in [-1, 1].

    A byte stands for all values that truncation maps to it, and this function returns the middle one. `of_frame`
    returns the least one, which would make each clip that starts from the frame before it darker by half a level.
    """
    return of_frame(frame_HWC).add_(1 / 255).clamp_(max=1)


def to_uint8(video: Tensor) -> Frames:
    """Clamps video [3, F, H, W] to [-1, 1], and maps it to uint8 frames [F, H, W, 3] by truncation, not rounding."""
    array: Frames = _as_bytes(video).cpu().numpy()
    return array


def _as_bytes(video: Tensor) -> Tensor:
    """Returns video [3, F, H, W] as [F, H, W, 3] of 0..255 on its device."""
    values = video.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)
    return values.permute(1, 2, 3, 0).contiguous()


def arrived(
    pieces: Iterable[Tensor], geometry: Geometry, device: str, rows: Rows, on_frames: FramesFn
) -> Frames | None:
    """Returns all frames of a video on the leader's CPU, as uint8 [F, H, W, 3]; returns None on other ranks.

    `pieces` yields this rank's rows of the decoded video, a few frames at a time: [3, f, h, W] in [-1, 1]. `rows` joins
    the rows of all ranks on the leader. `geometry` gives the number of frames. The leader calls `on_frames` with the
    frames of each piece, in order; at the same time, a GPU decodes the next piece.
    Raises NotFiniteError if a piece contains NaN or an infinity. If `on_frames` raises a WanFastError, this function
    raises the same error. The first error is raised after the last piece is decoded, because other ranks need this
    rank's rows of all pieces. After the first error, `on_frames` is not called again.
    """
    on_gpu = device == "cuda"
    finite = torch.empty(geometry.frames, dtype=torch.bool, pin_memory=on_gpu)  # of the piece that a frame begins
    video: Tensor | None = None  # on the leader
    on_its_way: deque[_Arrival] = deque()
    errors: list[WanFastError] = []

    def deliver(arrival: _Arrival) -> None:
        arrival.wait()
        try:
            require_finite("the decoded video", bool(finite[arrival.first]))
            if video is not None and not errors:
                on_frames(video[arrival.first : arrival.end].numpy())
        except WanFastError as error:
            errors.append(error)

    first = 0
    for piece in pieces:
        arrival = _Arrival(first, first + piece.shape[1], torch.cuda.Event() if on_gpu else None)  # type: ignore[no-untyped-call]
        whole = rows.collect(_as_bytes(piece), 1)
        if whole is not None:
            if video is None:
                video = torch.empty((geometry.frames, *whole.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
            video[arrival.first : arrival.end].copy_(whole, non_blocking=on_gpu)
        finite[first].copy_(all_finite(piece), non_blocking=on_gpu)
        arrival.record()
        on_its_way.append(arrival)
        first = arrival.end
        if len(on_its_way) > 1:
            deliver(on_its_way.popleft())
    while on_its_way:
        deliver(on_its_way.popleft())
    if errors:
        raise errors[0]
    return None if video is None else video.numpy()


@dataclass(frozen=True)
class _Arrival:
    """Names frames that are being copied from the device; `copied` comes after their copy, None on a CPU."""

    first: int
    end: int
    copied: torch.cuda.Event | None

    def record(self) -> None:
        if self.copied:
            self.copied.record()

    def wait(self) -> None:
        if self.copied:
            self.copied.synchronize()
