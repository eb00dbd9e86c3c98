"""Reads what a plan needs to know about images and the earlier video, and checks the number of images.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wanfast.runtime.config import EffectiveConfig, VideoConfig
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.media import images
from wanfast.runtime.media.earlier_video import load_earlier


def check_images(config: EffectiveConfig, spec: ModelSpec) -> None:
    """Raises ConfigError if the model or the recipe needs an image that is missing.

    If the model takes no images, each option that needs images raises ConfigError too: an option that names an image,
    --fit, a second --prompt, and a recipe for videos from images.
    """
    video, recipe = config.video, config.models.recipe
    num_images = RECIPES[recipe].num_images if recipe else 0
    if not spec.takes_images:
        refuse_image_options([*video.images, *(["--fit"] if video.fit != VideoConfig.fit else [])], spec)
        if num_images:
            raise ConfigError(
                f"--recipe {recipe} is for models that start from an image: use another --recipe, or use --model a14b"
            )
        if len(video.prompts) > 1:
            raise ConfigError(
                f"--prompt is given {len(video.prompts)} times, but {spec.name} makes videos from text alone, so no "
                "clip can start from another clip's frame: give --prompt once, or use --model a14b"
            )
    elif not (video.image or video.continue_from):
        raise ConfigError(
            f"--image is missing: {spec.name} makes no video from text alone: give the image that the video starts from"
        )
    if num_images > len(video.images):
        raise ConfigError(
            f"--recipe {recipe} needs a last image, because the recipe's weights are distilled for videos with a last "
            "image: add --last-image FILE, or use --recipe lightning-4"
        )


def refuse_image_options(flags: Iterable[str], spec: ModelSpec) -> None:
    """Raises ConfigError if the model takes no images, and `flags` is not empty.

    `flags`: the given options that only make sense with an image, such as "--image" and "--fit".
    """
    if not spec.takes_images and (unusable := next(iter(flags), None)):
        raise ConfigError(f"{unusable}: {spec.name} makes videos from text alone: drop {unusable}, or use --model a14b")


@dataclass(frozen=True)
class ImageFacts:
    """This class holds what a plan needs to know about one image; without an image, all its fields are empty."""

    sha256: str
    size: tuple[int, int]  # (width, height) in pixels
    notes: tuple[str, ...]


@remembered
def image_facts(path: str | None, option: str) -> ImageFacts:
    """Returns what a plan needs to know about an image; if `path` is None, all fields are empty.

    `option`: the option that gave `path`, such as "--image", for the message of an error. Raises ConfigError if the
    image cannot be read, or if its size or aspect ratio is not allowed. If a list names one image many times, the image
    is read once.
    """
    if path is None:
        return ImageFacts("", (0, 0), ())
    image = images.load_image(path, option)
    return ImageFacts(image.sha256, image.size, image.notes)


@dataclass(frozen=True)
class EarlierFacts(ImageFacts):
    """This class holds what a plan needs to know about the video that the new video continues."""

    num_frames: int
    fps: int


@remembered
def earlier_facts(path: str) -> EarlierFacts:
    """Returns what the plan of a new video needs to know about `path`, the video that the new video continues.

    Raises ConfigError if no clip can continue the video at `path`.
    """
    video = load_earlier(path)
    return EarlierFacts(video.sha256, video.size, video.notes, video.num_frames, video.fps)
