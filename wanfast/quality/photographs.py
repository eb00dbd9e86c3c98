"""Reads the packed photographs of `training/photographs.py`, and samples them as a moving camera sees them.

A shot names a photograph and the part of it that the clip's first frame shows. Every frame of a shot lies inside its
photograph. Colours between pixels are interpolated bilinearly.

Shapes: F frames, H x W pixels. A place is (x, y): the distance from the centre of the clip's first frame,
to the right and down. The unit is the frame's short side.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wanfast.quality.camera import CAMERAS

_LEAST_SCALE = 0.7  # pixels of the photograph for one of the frame: a little enlarged is still sharp enough
_LEAST_SHARE = 0.4  # of the largest part that fits


@dataclass(frozen=True)
class Shot:
    """Names a photograph and the part of it that a clip's first frame shows; lengths are in the photograph's pixels."""

    photograph: int  # its index in `Photographs.pictures`
    centre: tuple[float, float]  # x and y
    short_side: float  # of the frame
    mirrored: bool = False
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of red, green and blue


class Photographs:
    """Holds either the training photographs or the held-out ones, as uint8 tensors [3, H, W] on a device."""

    def __init__(self, pack: Path, device: str, *, held_out: bool) -> None:
        with zipfile.ZipFile(pack) as archive:
            chosen = [e for e in json.loads(archive.read("manifest.json")) if e["held_out"] == held_out]
            self.names: list[str] = [entry["name"] for entry in chosen]
            self.pictures = [_read(archive.read(f"{name}.jpg")).to(device) for name in self.names]

    def draw(self, rng: random.Random, camera: str, size: tuple[int, int], *, index: int | None = None) -> Shot:
        """Returns a shot whose frames, of `size` (width, height), stay inside the photograph while the camera moves.

        `camera` names the camera's motion. If `index` is None, the shot is for training: photograph, place, scale and
        tint are random, and the shot may be mirrored. Otherwise `index` chooses the photograph, the shot is as large as
        possible, and only the place is random.
        """
        low, high = _reach(camera, size)  # of all frames, in short sides
        photograph = rng.randrange(len(self.pictures)) if index is None else index
        height, width = self.pictures[photograph].shape[1:]
        most = min(width / (high[0] - low[0]), height / (high[1] - low[1]))
        least = min(most, max(_LEAST_SCALE * min(size), _LEAST_SHARE * most))
        scale = rng.uniform(least, most) if index is None else most
        x, y = (
            rng.uniform(-scale * a, side - scale * b) for a, b, side in zip(low, high, (width, height), strict=True)
        )
        if index is not None:
            return Shot(photograph, (x, y), scale)
        red, green, blue = (rng.uniform(0.8, 1.1) for _ in range(3))
        return Shot(photograph, (x, y), scale, rng.random() < 0.5, (red, green, blue))

    def sample(self, shot: Shot, places: Tensor) -> Tensor:
        """Returns the photograph's colours [F, H, W, 3], in 0..1, at `places` [F, H, W, 2].

        A place is (x, y), in units of the frame's short side. In all frames, the origin is the centre of the shot's
        first frame.
        """
        picture = self.pictures[shot.photograph]
        height, width = picture.shape[1:]
        flip = places.new_tensor((-1.0 if shot.mirrored else 1.0, 1.0))
        x = width - shot.centre[0] if shot.mirrored else shot.centre[0]
        centre, sides = places.new_tensor((x, shot.centre[1])), places.new_tensor((width, height))
        grid = (places * flip * shot.short_side + centre) / sides * 2 - 1
        values = F.grid_sample(
            picture[None].float() / 255, grid.flatten(0, 1)[None], padding_mode="border", align_corners=False
        )
        seen = values[0].permute(1, 2, 0).reshape(*places.shape[:-1], 3) * places.new_tensor(shot.gains)
        return seen.clamp(0, 1)


def _reach(camera: str, size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the least and the largest (x, y) that a clip shows, in short sides from the first frame's centre."""
    path = CAMERAS[camera].at(np.linspace(0, 1, 5))
    half = np.array(size) / min(size) / 2
    corners = half * np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    cos, sin = np.cos(path[:, 3, None]), np.sin(path[:, 3, None])
    zoom = np.exp(-path[:, 2, None])
    x = (corners[:, 0] * cos - corners[:, 1] * sin) * zoom + path[:, 0, None]
    y = (corners[:, 0] * sin + corners[:, 1] * cos) * zoom + path[:, 1, None]
    return (float(x.min()), float(y.min())), (float(x.max()), float(y.max()))


def _read(jpeg: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))).permute(2, 0, 1).contiguous()
