"""Turns a client's request into a job, or raises an error that names the wrong field.

A job is queued only if its video can be planned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, parse_size
from wanfast.runtime.config.precedence import without_overridden
from wanfast.runtime.config.recipes import OF_GRID, RECIPES, has_levels
from wanfast.runtime.config.video import CPU_SEEDS
from wanfast.runtime.errors import ConfigError, WanFastError
from wanfast.runtime.facts.choices import NAMED_MODELS, RecipeName
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.processes.handle import Opened
from wanfast.server.fields import IMAGE, IMAGES, LAST, Asked, Fields
from wanfast.server.replies import ApiError, in_fields, in_names_of_fields, unfit, without_paths
from wanfast.server.store import NewJob

_LONGEST_S = 12  # the longest that clients of OpenAI's video API ask for
_MOST_CLIPS = 100
_OF_ONE_VIDEO = {"image", "last_image", "prompt", "seed"}
_UNPLANNED = "the server cannot plan this video; the server's log has the reason"


class Planner(Protocol):
    """This interface plans videos for loaded models; `Opened` implements it."""

    @property
    def asked(self) -> Mapping[str, Any]:
        """Returns the options with which the models were opened."""

    def has_models_of(self, recipe: RecipeName) -> bool:
        """Returns whether the loaded models can make a video by this recipe."""

    def plan(self, options: dict[str, Any]) -> Plan:
        """Returns the plan of a video. Raises WanFastError."""


@dataclass(frozen=True)
class Served:
    """This class describes what a server offers: its model, its largest video, and its default options."""

    planner: Planner
    spec: ModelSpec
    model: str  # the name that clients use
    size: tuple[int, int]  # (width, height) of the largest video
    frames: int  # of the longest clip
    clips: int = 1  # of the longest video
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def most_frames(self) -> int:
        """Returns the number of frames of the longest clip that a request may ask for.

        This number is at most the number of frames on which the model was trained.
        """
        return min(self.frames, self.spec.trained_frames or self.frames)

    @property
    def joined_frames(self) -> int:
        """Returns the number of frames of the longest video that a request may ask for.

        The video joins `clips` clips, each of `most_frames` frames. Neighbouring clips share one frame.
        """
        return self.clips * (self.most_frames - 1) + 1

    @property
    def total_frames(self) -> int:
        """Returns the number of frames of the longest video that the server makes.

        This is the larger of two lengths: `joined_frames`, which a request may ask for, and `frames`, which a request
        without a length gets.
        """
        return max(self.frames, self.joined_frames)

    @property
    def fit(self) -> dict[str, str]:
        """Returns the option {"fit": "crop"} if the model takes images, else {}.

        The option crops the image, so that the video has exactly the requested size.
        """
        return {"fit": "crop"} if self.spec.takes_images else {}

    @classmethod
    def of(cls, opened: Opened, defaults: Mapping[str, Any], max_clips: int | None) -> Served:
        """Describes what a server offers.

        `opened`: the server's opened models. `defaults`: options of `Handle.make` that a request may override.
        `max_clips`: the largest number of clips of one video; None: as many as 12 seconds need. Every video has one
        clip if the model takes no images, or if a clip has only one frame. Raises ConfigError if `max_clips` is larger
        than 1 for such a server.
        """
        config, spec = opened.placed.config, opened.files.spec
        name = config.models.model if config.models.model in NAMED_MODELS else spec.name
        frames = config.video.frames
        one = cls(opened, spec, name, parse_size(config.video.size), frames, 1, defaults)
        if not spec.takes_images or frames == 1:
            if max_clips not in (None, 1):
                why = (
                    "a clip of one frame adds nothing" if frames == 1 else "no clip can start from another one's frame"
                )
                raise ConfigError(f"--max-clips {max_clips}: every video has one clip, because {why}: drop --max-clips")
            return one
        clips = _clips_of(_LONGEST_S * defaults.get("fps", spec.fps) / 4, one.most_frames)
        return dataclasses.replace(one, clips=max_clips or min(clips, _MOST_CLIPS))


class Checks:
    """This class checks requests. Any thread may call its methods, but only one image is decoded at a time."""

    def __init__(self, served: Served) -> None:
        self._served, self._decoding = served, threading.Lock()

    @property
    def takes_images(self) -> bool:
        """Returns whether a request must have an image; if not, the request must have no image."""
        return self._served.spec.takes_images

    def job(self, asked: Asked, owner: str, idempotency_key: str | None) -> NewJob:
        """Converts a request to a job that can be queued. Raises ApiError if a field is wrong.

        `owner`: the client. `idempotency_key`: the request's header of this name, or None. This method does not decode
        the request's images; `plan` does.
        """
        fields, served = asked.fields, self._served
        if fields.model not in (None, served.model, served.spec.name):
            message = f"model: this server has only {served.model}"
            raise ApiError(404, message, param="model", code="model_not_found")
        recipe = fields.recipe or served.planner.asked.get("recipe")
        self._check_images(asked, recipe)
        boundary = fields.boundary_ratio
        if boundary not in (None, served.spec.boundary):
            raise unfit(
                "boundary_ratio",
                f"only the model's own value {served.spec.boundary:g} is possible: leave out this field",
            )
        own = self._options(fields)
        if has_levels(recipe):
            for field in in_names_of_fields({name: own.get(name) for name in OF_GRID}):
                raise unfit(field, f"the recipe {recipe} has its own noise levels: leave out this field")
        options = {**without_overridden(served.defaults, own), **own}
        fps = options.get("fps", served.spec.fps)
        frames, clips = self._length(fields, fps)
        width, height = self._size(fields)
        options |= {"size": f"{width}x{height}", "frames": frames, **served.fit}
        if clips > 1 and "last_image" in asked.images:
            one = _length_of(served.most_frames, fps)
            raise unfit(LAST, f"a video with a last image has a single clip, of at most {one}: ask for fewer seconds")
        if clips > 1:  # each clip starts from the last frame of the one before
            options["prompt"] = [fields.prompt] * clips
        return NewJob(
            owner=owner,
            options={**options, "seed": _seed(fields, clips)},
            model=served.model,
            size=f"{width}x{height}",
            seconds=f"{fields.seconds or frames / fps:g}",
            fingerprint=_fingerprint(asked),
            idempotency_key=idempotency_key,
            priority=fields.priority,
        )

    def plan(self, new: NewJob, images: Mapping[str, bytes]) -> None:
        """Plans the video of a job, so that a wrong option or image is refused before the job is queued.

        `images`: the content of each image file, by the option of `Handle.make` that gets the image. Raises ApiError.
        """
        with self._decoding, ExitStack() as opened:
            paths = {}
            for option, image in images.items():
                file = opened.enter_context(tempfile.TemporaryFile())  # nothing is left, however this process ends
                file.write(image)
                file.flush()
                paths[option] = f"/proc/self/fd/{file.fileno()}"
            try:
                with asked_once():
                    self._served.planner.plan({**new.options, **paths})
            except ConfigError as error:
                raise _refusal(error, paths.values()) from None
            except WanFastError as error:  # what is wrong with the server is not for its clients
                raise ApiError(503, without_paths(str(error), _UNPLANNED), code="unavailable") from error

    def offer(self) -> dict[str, Any]:
        """Returns what a client may ask for, as a JSON object.

        The object holds the default of each field, the server's recipe, the possible recipes, whether a request must
        have an image, and the longest video in seconds.
        """
        served = self._served
        chosen = EffectiveConfig.of({**NO_VIDEO, **served.planner.asked, **served.defaults}, served.spec).video
        width, height = served.size
        own = dataclasses.asdict(chosen) | {"size": f"{width}x{height}", "frames": served.frames}
        defaults = in_names_of_fields({name: own[name] for name in own.keys() - _OF_ONE_VIDEO})
        recipes = [name for name in RECIPES if served.planner.has_models_of(name)]
        return {
            "defaults": defaults,
            "recipe": served.planner.asked.get("recipe"),
            "recipes": recipes,
            "takes_images": self.takes_images,
            "max_seconds": served.joined_frames / chosen.fps,
        }

    def _check_images(self, asked: Asked, recipe: RecipeName | None) -> None:
        for name, option in IMAGES.items():
            if option in asked.images and not self.takes_images:
                raise unfit(name, "this model makes videos from text alone: leave it out")
        if self.takes_images and "image" not in asked.images:
            raise unfit(IMAGE, "is missing: this model makes a video from an image")
        if recipe and needs_last_image(recipe) and "last_image" not in asked.images:
            raise unfit(LAST, f"is missing: the recipe {recipe} makes videos between two images")

    def _options(self, fields: Fields) -> dict[str, Any]:
        second = fields.guidance_scale if fields.guidance_scale_2 is None else fields.guidance_scale_2
        options = {
            "prompt": fields.prompt,
            "negative_prompt": fields.negative_prompt,
            "fps": fields.fps,
            "steps": fields.num_inference_steps,
            "guidance_high_noise": fields.guidance_scale,
            "guidance_low_noise": second,
            "shift": fields.flow_shift,
            "recipe": fields.recipe,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _length(self, fields: Fields, fps: int) -> tuple[int, int]:
        """Returns (the number of frames of each clip, the number of clips)."""
        served = self._served
        if fields.seconds is not None and fields.num_frames is not None:
            raise unfit("num_frames", "the field seconds also gives the length: keep one of the two")
        most = served.most_frames
        if fields.num_frames is not None:
            if fields.num_frames > most:
                fix = "; a longer video has several clips: give seconds instead" if served.clips > 1 else ""
                raise unfit("num_frames", f"one clip has at most {_length_of(most, fps)}{fix}")
            return fields.num_frames, 1
        if fields.seconds is None:
            return served.frames, 1
        groups = fields.seconds * fps / 4  # of four frames
        clips = _clips_of(groups, most)
        frames = 4 * round(groups / clips) + 1
        if clips > served.clips or frames > most:
            why = "" if served.spec.takes_images else ", because this model cannot start a clip from an image"
            raise unfit("seconds", f"one video has at most {_length_of(served.joined_frames, fps)}{why}")
        return frames, clips

    def _size(self, fields: Fields) -> tuple[int, int]:
        if fields.size is None:
            return self._served.size
        try:
            width, height = parse_size(fields.size)
        except ConfigError as error:
            raise _refusal(error) from None
        most_width, most_height = self._served.size
        if width * height > most_width * most_height:
            raise unfit(
                "size",
                f"a frame has at most {most_width * most_height:,} pixels on this server, as in "
                f"{most_width}x{most_height}: use a smaller size",
            )
        return width, height


def _clips_of(groups: float, most_frames: int) -> int:
    """Returns how many clips of at most `most_frames` frames a video needs; `groups`: its length, in 4 frames."""
    return max(1, math.ceil(round(groups) / max(1, most_frames // 4)))


def _length_of(frames: int, fps: int) -> str:
    return f"{frames} frames on this server ({frames / fps:g} seconds at {fps} frames per second)"


def _seed(fields: Fields, clips: int) -> int:
    """Returns the seed of the first clip. Raises ApiError if the last clip's seed would be too large."""
    if fields.seed is None:
        return secrets.randbelow(1 << 31)
    if clips > 1 and fields.seed + clips > CPU_SEEDS:
        seeds = f"this video has {clips} clips, and each clip adds 1 to the seed"
        raise unfit("seed", f"{seeds}: use at most {CPU_SEEDS - clips}")
    return fields.seed


def needs_last_image(recipe: RecipeName) -> bool:
    return RECIPES[recipe].num_images > 1


def _fingerprint(asked: Asked) -> str:
    """Returns a hash of a request's fields and images, by which a repeated request is recognized."""
    images = {option: hashlib.sha256(data).hexdigest() for option, data in asked.images.items()}
    return hashlib.sha256(json.dumps([asked.fields.model_dump(), images], sort_keys=True).encode()).hexdigest()


def _refusal(error: ConfigError, paths: Iterable[str] = ()) -> ApiError:
    """Converts an error about options into an error that names the fields of the request."""
    message, param = in_fields(error, paths)
    return ApiError(400, without_paths(message, _UNPLANNED), param=param, code="invalid_value")
