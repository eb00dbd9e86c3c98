"""Defines the motions that the tiny model knows, as paths of a shape over a clip.

A path gives four values for each moment u in [0, 1]. x (right) and y (down) say how far the shape has moved, in units
of the frame's height. The other two values are the logarithm of the shape's growth, and the shape's rotation in radians
(clockwise). The training clips and the judge of the videos both use the table `MOTIONS`, so that a caption means the
same motion to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MotionPath = npt.NDArray[np.float64]  # [moments, 4]: x, y, log growth, rotation

_TRAVEL = 0.36  # of the frame's height
_RADIUS = 0.16
_HOP = 0.22


@dataclass(frozen=True)
class Motion:
    """Holds the path of one motion, and the phrases by which captions name the motion."""

    path: Callable[[MotionPath], list[MotionPath]]
    phrases: tuple[str, ...]

    def at(self, moments: npt.ArrayLike) -> MotionPath:
        """Returns [moments, 4]: x, y, log growth and rotation at each moment; a moment is a number in [0, 1]."""
        u = np.asarray(moments, dtype=np.float64)
        return np.stack(self.path(u), axis=-1)


PathFn = Callable[[npt.ArrayLike], MotionPath]  # moments -> the path at these moments


def errors_of(path: MotionPath, known: Mapping[str, PathFn], tolerance: npt.NDArray[np.float64]) -> dict[str, float]:
    """Returns, for each known motion, the squared distance between `path` and the motion's path.

    At each moment, the differences of the four values are divided by `tolerance` [4], squared and summed. The distance
    is the mean over the moments.
    """
    moments = np.linspace(0, 1, len(path))
    return {name: float(np.square((path - at(moments)) / tolerance).sum(axis=1).mean()) for name, at in known.items()}


MOTIONS: dict[str, Motion] = {
    "right": Motion(lambda u: [_TRAVEL * u, 0 * u, 0 * u, 0 * u], ("moves right", "slides to the right", "goes right")),
    "left": Motion(lambda u: [-_TRAVEL * u, 0 * u, 0 * u, 0 * u], ("moves left", "slides to the left", "goes left")),
    "up": Motion(lambda u: [0 * u, -_TRAVEL * u, 0 * u, 0 * u], ("moves up", "rises", "goes up")),
    "down": Motion(lambda u: [0 * u, _TRAVEL * u, 0 * u, 0 * u], ("moves down", "sinks", "goes down")),
    "circle": Motion(
        lambda u: [_RADIUS * np.sin(math.tau * u), _RADIUS * (1 - np.cos(math.tau * u)), 0 * u, 0 * u],
        ("moves in a circle", "circles around", "goes around in a circle"),
    ),
    "bounce": Motion(
        lambda u: [0 * u, -_HOP * np.abs(np.sin(math.tau * u)), 0 * u, 0 * u], ("bounces", "hops", "jumps up and down")
    ),
    "grow": Motion(lambda u: [0 * u, 0 * u, math.log(1.9) * u, 0 * u], ("grows", "gets bigger", "expands")),
    "shrink": Motion(lambda u: [0 * u, 0 * u, -math.log(2.2) * u, 0 * u], ("shrinks", "gets smaller", "contracts")),
    "spin": Motion(lambda u: [0 * u, 0 * u, 0 * u, math.pi * u], ("spins", "rotates", "turns around")),
    "still": Motion(lambda u: [0 * u, 0 * u, 0 * u, 0 * u], ("stands still", "does not move", "stays in place")),
}
