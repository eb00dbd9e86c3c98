"""Computes the sizes of a video in pixels, latents and tokens.

A video of F = 4n+1 frames of H x W pixels becomes T = (F-1)/4 + 1 latent frames of H/8 x W/8, and
T * (H/16) * (W/16) tokens. Example: 81 frames of 1280x720 pixels become 21 latent frames of 160x90, and 75,600 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import ImageFit
from wanfast.runtime.facts.model_spec import ModelSpec

MAX_ASPECT = 4  # long side : short side of an image


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """This class holds the three grids of one video: pixels, latents and tokens."""

    width: int
    height: int
    frames: int
    latent_frames: int
    latent_height: int
    latent_width: int
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Returns the grid (T, Y, X) of the tokens; a token's place in the grid is its rotary position."""
        pt, py, px = self.patch_size
        return self.latent_frames // pt, self.latent_height // py, self.latent_width // px

    @property
    def tokens(self) -> int:
        return math.prod(self.token_grid)


def geometry_of(
    spec: ModelSpec, fit: ImageFit, size: tuple[int, int], frames: int, image_size: tuple[int, int]
) -> Geometry:
    """Returns the sizes of the video for an image of `image_size` (width, height).

    With fit "crop" or "pad", the video has exactly the width and height of `size`, which are multiples of 16. With
    fit "area", the video has the image's aspect ratio, and about as many pixels as `size`. If the model takes no
    images, the video has exactly the size `size` with every fit. Raises ConfigError if a side becomes 0.
    """
    if fit == "area" and spec.takes_images:
        return fit_geometry(spec, *size, frames, image_size)
    return _exact_geometry(spec, size, frames)


def _exact_geometry(spec: ModelSpec, size: tuple[int, int], frames: int) -> Geometry:
    width, height = (side // spec.vae.spatial_stride for side in size)
    return _geometry(spec, width, height, frames)


def middle_box(image_size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a box in the centre of an image of `image_size` (width, height).

    The box has the aspect ratio width:height, and is as large as the image allows.
    """
    shown = inner_size((width, height), *image_size)
    left, top = ((whole - part) // 2 for whole, part in zip(image_size, shown, strict=True))
    return left, top, left + shown[0], top + shown[1]


def inner_size(shape: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Returns the largest (width, height) inside `width` x `height` that has the aspect ratio of `shape`.

    `shape` is (width, height) too. Both numbers of the result are rounded, so its aspect ratio may differ a little.
    """
    scale = min(width / shape[0], height / shape[1])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def fit_geometry(
    spec: ModelSpec, area_width: int, area_height: int, frames: int, image_size: tuple[int, int]
) -> Geometry:
    """Returns the sizes of a video with the image's aspect ratio, and about as many pixels as --size.

    --size is area_width x area_height. `image_size` is the image's (width, height). Each side is rounded down to a
    multiple of 16 pixels, after floating-point operations like those of the reference program. A rounding error can
    therefore cost 16 pixels: at --size 832x480, an image of 832x480 gives a video of 832x464.
    Raises ConfigError if a side becomes 0. Source: Wan-Video/Wan2.2, wan/image2video.py.
    """
    # Every float64 operation is that of the reference program, so that this function rounds in the same way.
    image_width, image_height = image_size
    area, aspect = area_width * area_height, image_height / image_width
    stride, (_, patch_y, patch_x) = spec.vae.spatial_stride, spec.dit.patch_size
    latent_height = round(math.sqrt(area * aspect) // stride // patch_y * patch_y)
    latent_width = round(math.sqrt(area / aspect) // stride // patch_x * patch_x)
    if not (latent_height and latent_width):
        raise ConfigError(
            f"--size {area_width}x{area_height} is too small for an image of {image_width}x{image_height}: "
            "use a larger --size"
        )
    return _geometry(spec, latent_width, latent_height, frames)


def largest_geometry(spec: ModelSpec, area_width: int, area_height: int, frames: int) -> Geometry:
    """Returns the sizes of the largest video that this --size and `frames` allow, over all aspect ratios of the image.

    --size is area_width x area_height. The largest video is the one with the most tokens: 32,760 at 832x480 and 81
    frames. If several videos have the most tokens, the function takes the aspect ratio that is nearest to that of
    --size. If the model takes no images, the video has exactly --size.
    """
    if not spec.takes_images:
        return _exact_geometry(spec, (area_width, area_height), frames)
    _, patch_y, patch_x = spec.dit.patch_size
    token_area = spec.vae.spatial_stride**2 * patch_y * patch_x
    cells, aspect = area_width * area_height // token_area, area_height / area_width
    rows = range(max(1, math.isqrt(cells // MAX_ASPECT)), math.isqrt(cells * MAX_ASPECT) + 1)
    best = max(rows, key=lambda y: (y * (cells // y), -abs(math.log(y / (cells // y or 1) / aspect))))
    return _geometry(spec, cells // best * patch_x, best * patch_y, frames)


def _geometry(spec: ModelSpec, latent_width: int, latent_height: int, frames: int) -> Geometry:
    return Geometry(
        width=latent_width * spec.vae.spatial_stride,
        height=latent_height * spec.vae.spatial_stride,
        frames=frames,
        latent_frames=(frames - 1) // spec.vae.temporal_stride + 1,
        latent_height=latent_height,
        latent_width=latent_width,
        patch_size=spec.dit.patch_size,
    )
