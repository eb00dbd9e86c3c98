"""Mixes the clips that all stages learn from, and names their formats: sizes, aspect ratios and lengths.

A clip shows shapes over a pattern, a photograph under a moving camera, or shapes over a photograph, each with a share
of its own. Photographs are the hardest for the VAE, and shapes for the experts, so the shares differ. The experts learn
some motions last: shapes that spin or shrink, and cameras that zoom or turn. So at least a third of the clips of
shapes must spin and an eighth must shrink, and at least half of the clips of photographs alone zoom or turn. A clip
depends only on its number, its format and the shares.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from training.spec import SPEC
from wanfast.quality.photographs import Photographs
from wanfast.quality.world import Renderer, Scene, draw_photo_scene, draw_scene, moments_of_clip
from wanfast.runtime.facts.shapes import fit_geometry


@dataclass(frozen=True)
class Format:
    """Holds the format of clips: their size (width, height) in pixels, and their number of frames."""

    size: tuple[int, int]
    frames: int


def formats(side: int, frames: int) -> tuple[Format, Format, Format]:
    """Returns the formats of square, 4:3 and 3:4 images at --size `side`x`side`, as the pipeline sizes them."""
    fitted = [fit_geometry(SPEC, side, side, frames, image) for image in ((1, 1), (4, 3), (3, 4))]
    square, wide, tall = (Format((geometry.width, geometry.height), frames) for geometry in fitted)
    return square, wide, tall


@dataclass(frozen=True)
class Shares:
    """Holds the share of clips with a photograph alone, and the share of those with shapes over a photograph."""

    photographs: float
    shapes_over_photographs: float


FOR_VAE, FOR_EXPERTS = Shares(0.5, 0.3), Shares(0.25, 0.2)
# One of these sets is drawn for each clip, with these weights. A clip shows a motion of its set; an empty set has all.
_OF_SHAPES = {("spin",): 8, ("shrink",): 3, (): 13}
_OF_CAMERAS = {("zoom in", "zoom out", "turn right", "turn left"): 1, (): 1}
MIX = repr((FOR_EXPERTS, _OF_SHAPES, _OF_CAMERAS))  # what clips of the experts depend on, besides number and format
_OTHER = 10**9  # farther than any two numbers of clips
SMALL = formats(128, 17)
LARGE = formats(256, 33)


class Mix:
    """Draws and renders the clips of training; `held_out` chooses the held-out photographs instead of the others."""

    def __init__(self, pack: Path, device: str, shares: Shares = FOR_EXPERTS, *, held_out: bool = False) -> None:
        self.photographs = Photographs(pack, device, held_out=held_out)
        self.renderer = Renderer(device, self.photographs)
        self.device, self.shares = device, shares

    def scene(self, number: int, size: tuple[int, int]) -> Scene:
        rng = random.Random(f"mix/{number}")
        kind = rng.random()
        has_shapes = kind >= self.shares.photographs
        has_photograph = kind < self.shares.photographs + self.shares.shapes_over_photographs
        sets: dict[tuple[str, ...], int] = _OF_SHAPES if has_shapes else _OF_CAMERAS
        (wanted,) = rng.choices(list(sets), list(sets.values()))
        while True:
            if has_photograph:
                scene = draw_photo_scene(number, self.photographs, size, with_shapes=has_shapes)
            else:
                scene = draw_scene(number)
            if not wanted or (scene.motion if has_shapes else scene.camera) in wanted:
                return scene
            number += _OTHER

    def render(
        self,
        scenes: list[Scene],
        form: Format,
        window: tuple[int, int, int] | None = None,
        frames: slice = slice(None),
    ) -> Tensor:
        """Returns the scenes' clips [B, 3, F, H, W] in [-1, 1].

        `window` is a square part of each frame, (left, top, side) in pixels; None takes whole frames. `frames` selects
        the frames to render.
        """
        return self.renderer(scenes, moments_of_clip(form.frames)[frames], window, form.size)
