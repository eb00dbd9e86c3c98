"""Draws the procedural world that the tiny model learns: textured shapes that move as a caption says.

A scene is drawn from a seed. It has one subject, which the caption names, up to two bystanders and a patterned
background. The subject and the camera never both move. Rendering is batched on the device. A shape is a mask from an
atlas, sampled through the inverse of the shape's motion. So any frame, or any window of a frame, can be rendered alone.

Shapes: B clips, F frames, H x W pixels; S shapes in the atlas.
A tenth of all (shape, colour, motion) combinations is held out. A held-out clip shows a motion that training never
shows for a subject of this shape and colour. Bystanders stand still, may have any combination of shape and colour, and
are named in no caption.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wanfast.quality.motions import MOTIONS

SIZE = 128  # pixels a side
FRAMES = 17
_ATLAS = 96  # pixels of a mask
_MARGIN = 0.04  # free space around a subject, in frame heights

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 220),
    "yellow": (250, 210, 40),
    "orange": (245, 130, 30),
    "purple": (130, 60, 180),
    "white": (245, 245, 245),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "star", "triangle", "cross", "heart", "letter A", "letter K", "letter R")
SIZES = {"small": 0.22, "big": 0.32}  # in frame heights
BACKGROUNDS = ("plain", "striped", "checkered", "wavy")
# These colours are muted, so that no background has the colour of a shape.
_BACKGROUND_COLOURS = (
    (120, 140, 150),
    (150, 130, 110),
    (150, 120, 120),
    (140, 115, 140),
    (105, 115, 140),
    (155, 140, 105),
)
CAMERAS: dict[str, tuple[tuple[float, float, float], tuple[str, ...]]] = {  # (x, y, log zoom) at the clip's end
    "pan right": ((0.3, 0, 0), ("The camera pans right.", "Pan to the right.")),
    "pan left": ((-0.3, 0, 0), ("The camera pans left.", "Pan to the left.")),
    "pan up": ((0, -0.3, 0), ("The camera pans up.", "Pan upward.")),
    "pan down": ((0, 0.3, 0), ("The camera pans down.", "Pan downward.")),
    "zoom in": ((0, 0, math.log(1.6)), ("The camera zooms in.", "A slow zoom in.")),
    "zoom out": ((0, 0, -math.log(1.5)), ("The camera zooms out.", "A slow zoom out.")),
}


@dataclass(frozen=True)
class Thing:
    """Describes one shape of a scene."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]  # x and y, in frame sizes
    angle: float  # radians
    texture: float  # phase, in turns


@dataclass(frozen=True)
class Scene:
    """Describes everything that a clip shows."""

    subject: Thing
    motion: str
    caption: str
    camera: str | None = None
    background: str = "plain"
    background_colours: tuple[int, int] = (0, 1)
    background_phase: float = 0.0
    bystanders: tuple[Thing, ...] = field(default=())


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    digest = hashlib.sha256(f"{shape}/{colour}/{motion}".encode()).digest()
    return digest[0] % 10 == 0


def draw_scene(seed: int, *, held_out: bool = False, camera_share: float = 0.15) -> Scene:
    """Returns the scene of `seed`.

    If `held_out` is true, the combination of shape, colour and motion is a held-out one; otherwise it is one of
    training.
    """
    rng = random.Random(f"{seed}/{held_out}")
    while True:
        shape, colour, motion = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(MOTIONS))
        if motion == "spin" and shape == "circle":
            continue  # a spinning circle shows no motion
        if is_held_out(shape, colour, motion) != held_out:
            continue
        camera = rng.choice(list(CAMERAS)) if rng.random() < camera_share else None
        if camera is None:
            break
        motion = "still"  # the world moves, not the subject
        if is_held_out(shape, colour, motion) == held_out:
            break
    size = rng.choice(list(SIZES))
    subject = Thing(shape, colour, size, _start(rng, motion, SIZES[size]), rng.uniform(-0.3, 0.3), rng.random())
    others = [name for name in COLOURS if name != colour]
    rng.shuffle(others)
    bystanders = tuple(
        Thing(rng.choice(SHAPES), other, "small", (rng.random(), rng.random()), rng.uniform(-0.3, 0.3), rng.random())
        for other in others[: rng.choice((0, 0, 1, 2))]
    )
    background = rng.choice(BACKGROUNDS)
    first, second = rng.sample(range(len(_BACKGROUND_COLOURS)), 2)
    scene = Scene(subject, motion, "", camera, background, (first, second), rng.random(), bystanders)
    return Scene(**{**scene.__dict__, "caption": _caption(rng, scene)})


def _start(rng: random.Random, motion: str, size: float) -> tuple[float, float]:
    """Returns a start position from which the whole path stays in the frame."""
    path = MOTIONS[motion].at(np.linspace(0, 1, FRAMES))
    half = 0.5 * size * np.exp(path[:, 2]) + _MARGIN
    low = np.maximum(0, half[:, None] - path[:, :2]).max(axis=0)
    high = np.minimum(1, 1 - half[:, None] - path[:, :2]).min(axis=0)
    x, y = (rng.uniform(lo, max(lo, hi)) for lo, hi in zip(low, high, strict=True))
    return x, y


def _caption(rng: random.Random, scene: Scene) -> str:
    thing = scene.subject
    size = f"{thing.size} " if rng.random() < 0.5 else ""
    name = f"{size}{thing.colour} {thing.shape}"
    article = "The" if rng.random() < 0.4 else "An" if name[0] in "aeiou" else "A"
    sentence = f"{article} {name} {rng.choice(MOTIONS[scene.motion].phrases)}"
    if rng.random() < 0.3:
        sentence += f" on a {scene.background} background"
    return sentence + "." + (f" {rng.choice(CAMERAS[scene.camera][1])}" if scene.camera else "")


def read_caption(prompt: str) -> tuple[str, str] | None:
    """Returns (colour, motion) of the subject that a caption of this world names; None for another text.

    A caption that moves the camera gives None, because the tracker follows a shape before a still background.
    """

    def named(words: Iterable[str]) -> list[str]:
        return [word for word in words if re.search(rf"\b{word}\b", prompt, re.IGNORECASE)]

    motions = [name for name, motion in MOTIONS.items() if named(motion.phrases)]
    moves_camera = named(words.rstrip(".") for _, phrases in CAMERAS.values() for words in phrases)
    colours = named(COLOURS)
    if len(colours) != 1 or len(motions) != 1 or moves_camera or not named(SHAPES):
        return None
    return colours[0], motions[0]


class Renderer:
    """Renders the clips of scenes on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.atlas = torch.from_numpy(np.stack([_mask(shape) for shape in SHAPES]))[:, None].to(device)  # [S, 1, A, A]

    @torch.no_grad()
    def __call__(self, scenes: list[Scene], moments: Tensor, window: tuple[int, int, int] | None = None) -> Tensor:
        """Returns [B, 3, F, H, W] in [-1, 1] at the moments [F] in 0..1.

        `window` is (left, top, side) in pixels of the frame; None renders the whole frame.
        """
        left, top, side = window or (0, 0, SIZE)
        axis = (torch.arange(side * 2, device=self.device) + 0.5) / (2 * SIZE)  # double resolution, averaged below
        y, x = torch.meshgrid(axis + top / SIZE, axis + left / SIZE, indexing="ij")
        points = torch.stack((x, y), dim=-1)[None, None] - 0.5  # [1, 1, h, w, 2], relative to the centre
        view = self._table([_camera_path(scene, moments) for scene in scenes])  # [B, F, 3]
        world = points * torch.exp(-view[..., 2])[..., None, None, None] + view[..., None, None, :2] + 0.5
        frames = self._background(scenes, world)
        for rank in range(1 + max(len(scene.bystanders) for scene in scenes)):
            frames = self._draw(frames, scenes, rank, world, moments)
        B = frames.shape[0]
        frames = F.avg_pool2d(frames.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
        return rearrange(frames * 2 - 1, "(B T) C h w -> B C T h w", B=B).contiguous()

    def _table(self, rows: list[npt.NDArray[np.float64]]) -> Tensor:
        return torch.from_numpy(np.stack(rows)).float().to(self.device)

    def _background(self, scenes: list[Scene], world: Tensor) -> Tensor:
        x, y = world.unbind(-1)
        phase = self._table([np.array(s.background_phase) for s in scenes])[:, None, None, None] * math.tau
        kinds = self._table([np.array(BACKGROUNDS.index(s.background)) for s in scenes])[:, None, None, None]
        patterns = (
            0.5 + 0.5 * torch.tanh(2 * (x * phase.cos() + y * phase.sin() - 0.5)),
            torch.sigmoid(6 * torch.sin(18 * (x * phase.cos() + y * phase.sin()))),
            torch.sigmoid(8 * torch.sin(14 * x + phase) * torch.sin(14 * y + phase)),
            0.5 + 0.5 * torch.sin(12 * y + 2 * torch.sin(9 * x + phase)),
        )
        blend = torch.stack([(kinds == k) * pattern for k, pattern in enumerate(patterns)]).sum(dim=0)
        first, second = (
            self._table([np.array(_BACKGROUND_COLOURS[s.background_colours[k]]) / 255 for s in scenes])[
                :, None, None, None
            ]
            for k in (0, 1)
        )
        return torch.lerp(first, second, blend[..., None])

    def _draw(self, frames: Tensor, scenes: list[Scene], rank: int, world: Tensor, moments: Tensor) -> Tensor:
        """Draws each scene's thing number `rank` over the frames; a scene with fewer things stays unchanged."""
        things = [_thing(scene, rank) for scene in scenes]
        still = np.zeros((len(moments), 4))
        paths = self._table(
            [
                MOTIONS[s.motion].at(moments.cpu()) if t is s.subject else still
                for s, t in zip(scenes, things, strict=True)
            ]
        )
        centres = self._table([np.array(t.centre if t else (9.0, 9.0)) for t in things])[:, None] + paths[..., :2]
        scale = self._table([np.array(SIZES[t.size] if t else 1.0) for t in things])[:, None] * torch.exp(paths[..., 2])
        angle = self._table([np.array(t.angle if t else 0.0) for t in things])[:, None] + paths[..., 3]
        offset = (world - centres[:, :, None, None]) / (0.5 * scale[:, :, None, None, None])
        cos, sin = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
        local = torch.stack(
            (offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin), dim=-1
        )  # [B, F, h, w, 2], -1..1 over the shape
        indices = [SHAPES.index(t.shape) if t else 0 for t in things]
        masks = self.atlas[indices].repeat_interleave(local.shape[1], dim=0)
        alpha = F.grid_sample(masks, local.flatten(0, 1), align_corners=False).view(local.shape[:-1])
        colour = self._table([np.array(COLOURS[t.colour if t else "red"]) / 255 for t in things])[:, None, None, None]
        phase = self._table([np.array(t.texture if t else 0.0) for t in things])[:, None, None, None] * math.tau
        shade = 1 - 0.18 * (0.5 + 0.5 * torch.sin(5 * local[..., 0] + phase))
        return torch.lerp(frames, colour * shade[..., None], alpha[..., None])


def _thing(scene: Scene, rank: int) -> Thing | None:
    """Returns thing number `rank` in drawing order (bystanders first, the subject on top), or None."""
    order: list[Thing | None] = [*scene.bystanders, scene.subject]
    return order[rank] if rank < len(order) else None


def _camera_path(scene: Scene, moments: Tensor) -> npt.NDArray[np.float64]:
    u: npt.NDArray[np.float64] = moments.cpu().numpy()[:, None].astype(np.float64)
    path: npt.NDArray[np.float64] = u * np.array(CAMERAS[scene.camera][0] if scene.camera else (0.0, 0.0, 0.0))
    return path


def moments_of_clip(frames: int = FRAMES) -> Tensor:
    return torch.linspace(0, 1, frames, dtype=torch.float64)


def _mask(shape: str) -> npt.NDArray[np.float32]:
    """Returns the shape's mask [A, A] in float32, 1 inside; it is drawn at four times the resolution and averaged."""
    fine = _ATLAS * 4
    image = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(image)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([((x + 1) / 2 * fine, (y + 1) / 2 * fine) for x, y in points], fill=255)

    if shape == "circle":
        draw.ellipse((0.1 * fine, 0.1 * fine, 0.9 * fine, 0.9 * fine), fill=255)
    elif shape == "square":
        polygon([(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)])
    elif shape == "triangle":
        polygon([(0, -0.85), (0.85, 0.7), (-0.85, 0.7)])
    elif shape == "star":
        radii = [(0.92, 0.4)[k % 2] for k in range(10)]
        polygon([(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)])
    elif shape == "cross":
        polygon([(-0.28, -0.85), (0.28, -0.85), (0.28, 0.85), (-0.28, 0.85)])
        polygon([(-0.85, -0.28), (0.85, -0.28), (0.85, 0.28), (-0.85, 0.28)])
    elif shape == "heart":
        turns = [k * math.tau / 100 for k in range(100)]
        polygon(
            [
                (
                    0.055 * 16 * math.sin(t) ** 3,
                    -0.055 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 0.1,
                )
                for t in turns
            ]
        )
    else:
        font = ImageFont.load_default(size=fine * 0.95)
        draw.text((fine / 2, fine / 2), shape[-1], fill=255, font=font, anchor="mm", stroke_width=fine // 40)
    small = image.resize((_ATLAS, _ATLAS), Image.Resampling.BOX)
    mask: npt.NDArray[np.float32] = np.asarray(small, dtype=np.float32) / np.float32(255)
    return mask
