"""Defines the motions of the camera during a clip.

A motion gives four values at each moment of the clip. All four are 0 at the start and change at a constant rate. x
(right) and y (down) say how far the camera has moved, in units of the frame's short side. The other two values are the
logarithm of the camera's zoom, and the camera's roll in radians (clockwise). The things in the picture move in the
opposite direction.
The table `CAMERAS` holds all motions. Training clips are made with this table, and generated videos are judged with it.
So a caption means the same motion in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CameraPath = npt.NDArray[np.float64]  # [moments, 4]: x, y, log zoom, roll

_TRAVEL = 0.24  # of the frame's short side
_ROLL = math.radians(20)


@dataclass(frozen=True)
class Camera:
    """Holds one camera motion: the end of the motion's path, and the sentences by which captions name the motion."""

    end: tuple[float, float, float, float]
    phrases: tuple[str, ...]

    def at(self, moments: npt.ArrayLike) -> CameraPath:
        """Returns the camera's path [n, 4]: x, y, log zoom and roll at each of n moments.

        `moments` holds n numbers from 0 (the start of the clip) to 1 (its end).
        """
        path: CameraPath = np.asarray(moments, dtype=np.float64)[:, None] * np.array(self.end)
        return path


def _pan(way: str, x: float, y: float) -> Camera:
    phrases = (f"The camera pans {way}.", f"The camera moves {way}.", f"Pan to the {way}.")
    if y:
        phrases = (f"The camera pans {way}.", f"The camera moves {way}.", f"Pan {way}ward.")
    return Camera((x, y, 0, 0), phrases)


def _turn(way: str, roll: float) -> Camera:
    return Camera(
        (0, 0, 0, roll), (f"The camera turns {way}.", f"The camera rotates {way}.", f"A slow {way} turn of the camera.")
    )


CAMERAS: dict[str, Camera] = {
    "pan right": _pan("right", _TRAVEL, 0),
    "pan left": _pan("left", -_TRAVEL, 0),
    "pan up": _pan("up", 0, -_TRAVEL),
    "pan down": _pan("down", 0, _TRAVEL),
    "zoom in": Camera((0, 0, math.log(1.45), 0), ("The camera zooms in.", "A slow zoom in.", "Zoom in.")),
    "zoom out": Camera((0, 0, -math.log(1.4), 0), ("The camera zooms out.", "A slow zoom out.", "Zoom out.")),
    "turn right": _turn("clockwise", _ROLL),
    "turn left": _turn("counterclockwise", -_ROLL),
    "still": Camera((0, 0, 0, 0), ("The camera stands still.", "The camera does not move.", "A still camera.")),
}
OVER_A_PHOTOGRAPH = ("over a photograph", "across a photograph", "over a picture")


def caption(name: str, choice: float, place: float) -> str:
    """Returns a caption for the camera motion `name`, such as "The camera zooms in over a photograph".

    `choice` and `place` are numbers in [0, 1). `choice` selects one of the motion's sentences. If `place` is below 0.4,
    words such as "over a photograph" are added, and `place` selects these words.
    """
    phrases = CAMERAS[name].phrases
    sentence = phrases[int(choice * len(phrases))]
    if place >= 0.4:
        return sentence
    return f"{sentence.removesuffix('.')} {OVER_A_PHOTOGRAPH[int(place / 0.4 * len(OVER_A_PHOTOGRAPH))]}."
