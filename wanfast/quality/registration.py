"""Finds which known camera motion a video shows, by registration of successive frames.

OpenCV finds corners in each frame, and follows the corners into the next frame (Lucas and Kanade, in a pyramid). RANSAC
fits a similarity transform to the corners' movements, and ignores corners that move in another way. The product of
these transforms gives the camera's path. The result is the known motion that has the nearest path. Limit: moving things
must fill less than half of the frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from wanfast.quality.camera import CAMERAS, CameraPath
from wanfast.quality.motions import errors_of

TOLERANCE = np.array([0.05, 0.05, 0.08, 0.08])  # one unit of error of x, y, log zoom and roll
_MAX_CORNERS = 400
_LEAST_CORNERS = 6
_RANSAC_PIXELS = 1.0


@dataclass(frozen=True)
class CameraVerdict:
    """Holds the camera motion that is nearest to the video's camera path, and an error for each known motion.

    An error is the distance of a motion's path from the video's path. If the frames have too little detail to find the
    camera's path, the motion is None and there are no errors.
    """

    camera: str | None
    errors: dict[str, float]


def classify(frames: npt.NDArray[np.uint8]) -> CameraVerdict:
    """Returns the camera motion that frames [F, H, W, 3] show."""
    path = follow(frames)
    if path is None:
        return CameraVerdict(None, {})
    errors = errors_of(path, {name: camera.at for name, camera in CAMERAS.items()}, TOLERANCE)
    return CameraVerdict(min(errors, key=errors.__getitem__), errors)


def follow(frames: npt.NDArray[np.uint8]) -> CameraPath | None:
    """Returns the camera's path [F, 4], relative to frame 0: x, y, log zoom and roll.

    x and y are in units of the frame's short side, and roll is in radians. Returns None if OpenCV could follow too few
    corners (feature points) from one frame to the next.
    """
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    height, width = grey[0].shape
    whole = np.eye(3)  # from a place in the first frame to its place in this one, relative to the centre
    rows = [(0.0, 0.0, 0.0, 0.0)]
    for before, after in pairwise(grey):
        step = _similarity(before, after)
        if step is None:
            return None
        whole = step @ whole
        x, y, _ = np.linalg.inv(whole) @ (0, 0, 1) / min(height, width)
        rows.append((x, y, math.log(math.hypot(whole[0, 0], whole[1, 0])), -math.atan2(whole[1, 0], whole[0, 0])))
    return np.array(rows)


def _similarity(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64] | None:
    """Returns the matrix [3, 3] that takes places of one frame to those of the next, relative to the centre."""
    corners = cv2.goodFeaturesToTrack(before, _MAX_CORNERS, qualityLevel=0.005, minDistance=max(3, len(before) // 40))
    if corners is None or len(corners) < _LEAST_CORNERS:
        return None
    found, status, _ = cv2.calcOpticalFlowPyrLK(before, after, corners, None, winSize=(15, 15), maxLevel=3)
    kept = status[:, 0] == 1
    if kept.sum() < _LEAST_CORNERS:
        return None
    centre = np.array(before.shape[::-1]) / 2 - 0.5
    start, end = (points[kept].reshape(-1, 2) - centre for points in (corners, found))
    matrix, _ = cv2.estimateAffinePartial2D(start, end, method=cv2.RANSAC, ransacReprojThreshold=_RANSAC_PIXELS)
    if matrix is None:
        return None
    return np.vstack((matrix, (0, 0, 1)))
