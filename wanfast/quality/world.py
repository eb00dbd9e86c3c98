"""Draws the procedural world that the tiny model learns: textured shapes that move as a caption says.

A scene is drawn from a seed. Usually it has a patterned background, one subject, and up to two bystanders. The caption
names the subject, but not the bystanders. Bystanders have any shape and colour, and stand still. The subject and the
camera never both move. A photograph may be the background, or the whole scene.

About a tenth of all (shape, colour, motion) combinations is held out: training never shows a subject of this shape and
colour with this motion.

Several clips are rendered at once on the device. Any frame, or any window of a frame, can be rendered alone.

Shapes: B clips, F frames, H x W pixels; S kinds of shapes. Places are (x, y) in units of the frame's short side;
the frame's centre is (0.5, 0.5).
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wanfast.quality import camera
from wanfast.quality.camera import CAMERAS
from wanfast.quality.motions import MOTIONS
from wanfast.quality.photographs import Photographs, Shot

SIZE = 128  # pixels a side
FRAMES = 17
_ATLAS = 96  # pixels of a mask
_SMALL = 160  # pixels of a short side: below, a photograph is sampled at four times the resolution
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


@dataclass(frozen=True)
class Thing:
    """Describes one shape of a scene: its look, and its place in the first frame."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]  # x and y, in frame sizes
    angle: float  # radians
    texture: float  # phase, in turns


@dataclass(frozen=True)
class Scene:
    """Describes everything that a clip shows; if `subject` is None, the clip shows only a photograph."""

    subject: Thing | None
    motion: str
    caption: str
    camera: str | None = None
    background: str = "plain"
    background_colours: tuple[int, int] = (0, 1)
    background_phase: float = 0.0
    bystanders: tuple[Thing, ...] = field(default=())
    shot: Shot | None = None  # the photograph in the background

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Returns the subject's colour, by which the tracker follows the subject."""
        assert self.subject is not None
        return COLOURS[self.subject.colour]


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    digest = hashlib.sha256(f"{shape}/{colour}/{motion}".encode()).digest()
    return digest[0] % 10 == 0


def draw_scene(seed: int, *, held_out: bool = False, camera_share: float = 0.15) -> Scene:
    """Returns a random scene of shapes; the same arguments give the same scene.

    If `held_out` is true, training never shows the scene's combination of shape, colour and motion. If `held_out` is
    false, the scene is a training scene. `camera_share`: the approximate probability that the camera moves in a
    training scene; a held-out scene has a smaller probability. If the camera moves, the subject stands still, and the
    caption also names the camera's motion.
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


def draw_photo_scene(seed: int, photographs: Photographs, size: tuple[int, int], *, with_shapes: bool) -> Scene:
    """Returns a training scene that has a photograph as its background.

    If `with_shapes` is false, the scene shows only the photograph, and the camera may move. If `with_shapes` is true,
    shapes are drawn over the photograph, and either the subject or the camera may move.
    """
    rng = random.Random(f"{seed}/photograph/{with_shapes}")
    if not with_shapes:
        name = rng.choice(list(CAMERAS))
        words = camera.caption(name, rng.random(), rng.random())
        return Scene(None, "still", words, name, shot=photographs.draw(rng, name, size))
    scene = draw_scene(seed, camera_share=0.35)
    words = scene.caption.replace(f" on a {scene.background} background", f" {rng.choice(camera.OVER_A_PHOTOGRAPH)}")
    return replace(scene, caption=words, shot=photographs.draw(rng, scene.camera or "still", size))


def camera_scene(
    index: int, photographs: Photographs, size: tuple[int, int], *, photograph: int | None = None
) -> Scene:
    """Returns a scene in which the camera moves over a photograph; such scenes test the model's camera motions.

    `index`: the number of the scene, from 0. The camera's motion has the index `index` modulo the number of motions.
    `photograph`: the index of the photograph; None means `index` modulo the number of photographs. `size`: (width,
    height) of the frames in pixels.
    """
    rng = random.Random(f"{index}/judge")
    name = list(CAMERAS)[index % len(CAMERAS)]
    words = camera.caption(name, rng.random(), rng.random())
    chosen = index % len(photographs.pictures) if photograph is None else photograph
    return Scene(None, "still", words, name, shot=photographs.draw(rng, name, size, index=chosen))


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
    assert thing is not None
    size = f"{thing.size} " if rng.random() < 0.5 else ""
    name = f"{size}{thing.colour} {thing.shape}"
    article = "The" if rng.random() < 0.4 else "An" if name[0] in "aeiou" else "A"
    sentence = f"{article} {name} {rng.choice(MOTIONS[scene.motion].phrases)}"
    if rng.random() < 0.3:
        sentence += f" on a {scene.background} background"
    return sentence + "." + (f" {rng.choice(CAMERAS[scene.camera].phrases)}" if scene.camera else "")


def read_caption(prompt: str) -> tuple[str, str] | None:
    """Returns the colour and the motion that a caption gives its subject, such as ("orange", "right").

    Returns None if `prompt` is no caption of this world. Also returns None if `prompt` has a sentence about the camera,
    because the tracker needs a still background.
    """

    def named(words: Iterable[str]) -> list[str]:
        return [word for word in words if re.search(rf"\b{word}\b", prompt, re.IGNORECASE)]

    motions = [name for name, motion in MOTIONS.items() if named(motion.phrases)]
    moves_camera = named(words.rstrip(".") for camera in CAMERAS.values() for words in camera.phrases)
    colours = named(COLOURS)
    if len(colours) != 1 or len(motions) != 1 or moves_camera or not named(SHAPES):
        return None
    return colours[0], motions[0]


class Renderer:
    """Renders the clips of scenes on a device; for scenes with a photograph, `photographs` must be given."""

    def __init__(self, device: str, photographs: Photographs | None = None) -> None:
        self.device, self.photographs = device, photographs
        self.atlas = torch.from_numpy(np.stack([_mask(shape) for shape in SHAPES]))[:, None].to(device)  # [S, 1, A, A]

    @torch.no_grad()
    def __call__(
        self,
        scenes: list[Scene],
        moments: Tensor,
        window: tuple[int, int, int] | None = None,
        size: tuple[int, int] = (SIZE, SIZE),
    ) -> Tensor:
        """Returns [B, 3, F, H, W] in [-1, 1] at the moments [F] in 0..1, for frames of `size` (width, height).

        `window` is (left, top, side) in pixels of the frame; None renders the whole frame.
        """
        left, top, *sides = window or (0, 0, *size)
        box = (left, top, sides[0], sides[-1])
        points = self._points(size, box, 2)  # double resolution, averaged below
        view = self._table([_camera_path(scene, moments) for scene in scenes])  # [B, F, 4]
        world = _seen_by(view, points)
        frames = self._background(scenes, world)
        for row, scene in enumerate(scenes):
            if scene.shot is not None:
                frames[row] = self._photograph(scene.shot, view[row], size, box)
        for rank in range(max(len(scene.bystanders) + (scene.subject is not None) for scene in scenes)):
            frames = self._draw(frames, scenes, rank, world, moments)
        B = frames.shape[0]
        frames = F.avg_pool2d(frames.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
        return rearrange(frames * 2 - 1, "(B T) C h w -> B C T h w", B=B).contiguous()

    def _points(self, size: tuple[int, int], box: tuple[int, int, int, int], fine: int) -> Tensor:
        """Returns [1, 1, fine * h, fine * w, 2]: the points of a box (left, top, w, h) from the frame's centre."""
        side = min(size)
        x, y = (
            (torch.arange(count * fine, device=self.device) + 0.5) / (fine * side) + first / side - whole / (2 * side)
            for first, count, whole in zip(box[:2], box[2:], size, strict=True)
        )
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((columns, rows), dim=-1)[None, None]

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

    def _photograph(self, shot: Shot, view: Tensor, size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
        """Returns [F, h, w, 3] at double resolution; a small frame's pixel covers several of the photograph's."""
        assert self.photographs is not None
        times = 2 if min(size) <= _SMALL else 1
        world = _seen_by(view[None], self._points(size, box, 2 * times))[0]
        seen = self.photographs.sample(shot, world - 0.5)
        return F.avg_pool2d(seen.permute(0, 3, 1, 2), times).permute(0, 2, 3, 1)

    def _draw(self, frames: Tensor, scenes: list[Scene], rank: int, world: Tensor, moments: Tensor) -> Tensor:
        """Draws each scene's thing at index `rank` over the frames; a scene with fewer things stays unchanged."""
        things = [_thing(scene, rank) for scene in scenes]
        still = np.zeros((len(moments), 4))
        paths = self._table(
            [
                MOTIONS[s.motion].at(moments.cpu()) if t is not None and t is s.subject else still
                for s, t in zip(scenes, things, strict=True)
            ]
        )
        centres = self._table([np.array(t.centre if t else (9.0, 9.0)) for t in things])[:, None] + paths[..., :2]
        scale = self._table([np.array(SIZES[t.size] if t else 1.0) for t in things])[:, None] * torch.exp(paths[..., 2])
        angle = self._table([np.array(t.angle if t else 0.0) for t in things])[:, None] + paths[..., 3]
        # The inverse of the thing's motion takes a place of the scene to a place of the mask.
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
    """Returns the thing at index `rank` in drawing order (bystanders first, the subject on top), or None."""
    order = [*scene.bystanders, scene.subject]
    return order[rank] if rank < len(order) else None


def _camera_path(scene: Scene, moments: Tensor) -> npt.NDArray[np.float64]:
    return CAMERAS[scene.camera or "still"].at(moments.cpu().numpy())


def _seen_by(view: Tensor, points: Tensor) -> Tensor:
    """Returns [B, F, h, w, 2]: the places in the first frame that cameras `view` [B, F, 4] see at the points."""
    x, y, zoom, roll = (value[..., None, None] for value in view.unbind(-1))
    cos, sin = roll.cos(), roll.sin()
    across, down = points.unbind(-1)
    turned = torch.stack((across * cos - down * sin, across * sin + down * cos), dim=-1)
    return turned * torch.exp(-zoom)[..., None] + torch.stack((x, y), dim=-1) + 0.5


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
