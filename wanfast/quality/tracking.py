"""Finds which known motion a video shows, by tracking a shape of known colour through the frames.

In each frame, a soft mask says how much each pixel belongs to the shape. A pixel's value in the mask depends on how
near the pixel's colour is to the shape's colour, lit or shaded. The mask gives the shape's centre, size, and rotation
since the previous frame. The rotation is the angle that best aligns the polar profiles of the two frames' masks.
`motions.MOTIONS` holds the centre, size and rotation of each known motion over time. The result is the known motion
that is nearest to the tracked path.
Limit: the tracker follows one shape of one colour, and no background may have this colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wanfast.quality.motions import MOTIONS, MotionPath, errors_of

_SHADE = 0.82  # the darkest factor by which a shape's texture scales its colour
_REACH = 70.0  # scale of the colour distance: at 0.75 of it a pixel is no longer the shape's
_LOST_PIXELS = 12.0
TOLERANCE = np.array([0.05, 0.05, 0.15, 0.5])  # one unit of error of x, y, log growth and rotation
_MAX_TURN = math.radians(25)  # between frames


@dataclass(frozen=True)
class ThingVerdict:
    """Names the known motion that is nearest to the motion of the tracked shape.

    `motion`: a name in `motions.MOTIONS`. `errors`: for each name in `MOTIONS`, the distance between that motion and
    the shape's motion, computed by `motions.errors_of`. If the tracker lost the shape, `motion` is None and `errors`
    is empty.
    """

    motion: str | None
    errors: dict[str, float]


def classify(frames: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> ThingVerdict:
    """Finds which known motion a shape makes in frames [F, H, W, 3]; `colour` is the shape's RGB, in 0..255."""
    path = track(frames, colour)
    if path is None:
        return ThingVerdict(None, {})
    errors = errors_of(path, {name: motion.at for name, motion in MOTIONS.items()}, TOLERANCE)
    return ThingVerdict(min(errors, key=errors.__getitem__), errors)


def track(frames: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> MotionPath | None:
    """Tracks the shape of the given colour; returns the shape's path [F, 4], or None if the shape was lost.

    The columns are x, y (in frame heights), log growth and rotation (radians), all relative to frame 0.
    """
    rows = []
    turned, profile_before = 0.0, None
    for frame in frames:
        mask = soft_mask(frame, colour)
        pixels = mask.sum()
        if pixels < _LOST_PIXELS:
            return None
        height, width = mask.shape
        y, x = np.mgrid[:height, :width]
        centre = (mask * x).sum() / pixels, (mask * y).sum() / pixels
        profile = _polar_profile(mask, centre, math.sqrt(pixels))
        if profile_before is not None:
            turned += _turn(profile_before, profile)
        profile_before = profile
        rows.append((centre[0] / height, centre[1] / height, 0.5 * math.log(pixels), turned))
    path = np.array(rows)
    path[:, :3] -= path[0, :3]
    return path


def soft_mask(frame: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Returns [H, W] in 0..1: how much each pixel belongs to the shape.

    The shape's colours are all shades between its lit and its shaded colour. A pixel with such a colour gets 1. A pixel
    gets less if its colour differs more (distance in RGB), and 0 from a certain distance on. A pixel that lies far from
    the rest of the shape gets 0 too.
    """
    lit = np.array(colour, dtype=np.float64)
    shaded = lit * _SHADE
    axis = shaded - lit
    pixels = frame.astype(np.float64)
    share = ((pixels - lit) @ axis / max(float(axis @ axis), 1e-9)).clip(0, 1)
    distance = np.linalg.norm(pixels - (lit + share[..., None] * axis), axis=-1)
    mask = (1.5 - 2 * distance / _REACH).clip(0, 1)
    return mask if mask.sum() < _LOST_PIXELS else _largest_part(mask)


def _largest_part(mask: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the mask without outliers: only what lies near its median, within three of its own radii + 2 pixels."""
    y, x = np.nonzero(mask > 0.5)
    if len(x) == 0:
        return mask
    radius = 3 * math.sqrt(len(x) / math.pi) + 2
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    near: npt.NDArray[np.float64] = mask * (np.hypot(columns - np.median(x), rows - np.median(y)) < radius)
    return near


def _polar_profile(mask: npt.NDArray[np.float64], centre: tuple[float, float], size: float) -> npt.NDArray[np.float64]:
    """Returns [radii, 180 angles]: the mask around its centre, with radii in units of its size and zero mean a row."""
    angles = np.arange(180) * (math.tau / 180)
    radii = np.linspace(0.15, 0.9, 10)[:, None] * size
    x = centre[0] + radii * np.cos(angles)
    y = centre[1] + radii * np.sin(angles)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - x0, y - y0
    height, width = mask.shape

    def at(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        values: npt.NDArray[np.float64] = mask[row.clip(0, height - 1), column.clip(0, width - 1)] * inside
        return values

    top = at(y0, x0) * (1 - fx) + at(y0, x0 + 1) * fx
    bottom = at(y0 + 1, x0) * (1 - fx) + at(y0 + 1, x0 + 1) * fx
    profile: npt.NDArray[np.float64] = top * (1 - fy) + bottom * fy
    centred: npt.NDArray[np.float64] = profile - profile.mean(axis=1, keepdims=True)
    return centred


def _turn(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> float:
    """Returns the rotation in radians from one profile to the next: the peak of their circular correlation."""
    spectrum = np.conj(np.fft.rfft(before, axis=1)) * np.fft.rfft(after, axis=1)
    correlation = np.fft.irfft(spectrum.sum(axis=0), n=180)
    reach = int(_MAX_TURN / (math.tau / 180))
    shifts = np.arange(-reach, reach + 1)
    window = correlation[shifts % 180]
    best = int(window.argmax())
    if window[best] <= 0:
        return 0.0
    shift = float(shifts[best])
    if 0 < best < len(window) - 1:  # refine by a parabola through the peak
        left, peak, right = window[best - 1 : best + 2]
        curvature = left - 2 * peak + right
        shift += 0.5 * (left - right) / curvature if curvature < 0 else 0.0
    return shift * (math.tau / 180)
