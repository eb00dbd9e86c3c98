"""Reads the body of a request for a video: either JSON, or a form that contains the image as a file."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from wanfast.runtime.facts.choices import RecipeName
from wanfast.server.replies import ApiError, unfit

MOST_LETTERS = 20_000  # of a prompt; the model reads about 2,000
_MOST_FIELDS = 40  # without files
_MOST_COMMAS = 2 * MOST_LETTERS + 2 * _MOST_FIELDS  # of JSON: the two prompts, and what stands between fields
IMAGE, LAST = "input_reference", "last_image"
IMAGES = {IMAGE: "image", LAST: "last_image"}  # the fields that hold images -> options of `Handle.make`
_NESTED = {f"{name}[image_url]": name for name in IMAGES}  # how the openai client writes {"image_url": ...} into a form
_FILES = " and ".join(IMAGES)


class Fields(BaseModel):
    """This class holds the fields of a request for a video, except the images."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_LETTERS, description="What happens in the video.")]
    model: Annotated[str | None, Field(description="The model that the server has loaded.")] = None
    seconds: Annotated[
        float | None,
        Field(
            gt=0, le=3600, description='Length of the video in seconds, such as "4". A long video has several clips.'
        ),
    ] = None
    size: Annotated[str | None, Field(max_length=20, description="Exact size, as WIDTHxHEIGHT.")] = None
    negative_prompt: Annotated[
        str | None, Field(max_length=MOST_LETTERS, description="What the video must not show.")
    ] = None
    num_frames: Annotated[
        int | None, Field(description="Number of frames, 4n+1. Give either num_frames or seconds.")
    ] = None
    fps: Annotated[int | None, Field(ge=1, le=240, description="Frames per second.")] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=200, description="Number of denoising steps.")] = None
    guidance_scale: Annotated[
        float | None,
        Field(description="Guidance scale of both experts; with guidance_scale_2, only of the high-noise expert."),
    ] = None
    guidance_scale_2: Annotated[float | None, Field(description="Guidance scale of the low-noise expert.")] = None
    flow_shift: Annotated[float | None, Field(description="Shift of the noise levels.")] = None
    boundary_ratio: Annotated[float | None, Field(description="Only the model's own value is possible.")] = None
    seed: Annotated[int | None, Field(ge=0, description="Seed of the noise. The default is a random seed.")] = None
    recipe: Annotated[RecipeName | None, Field(description="A recipe whose models are loaded.")] = None
    priority: Annotated[int, Field(ge=-100, le=100, description="Jobs with a larger priority run first.")] = 0


@dataclass(frozen=True)
class Asked:
    """This class holds a request for a video: fields with checked types, and images that are not decoded yet."""

    fields: Fields
    images: Mapping[str, bytes]  # option of `Handle.make` -> content of the file; only those that the client sent


async def read(request: Request, most_bytes: int) -> Asked:
    """Reads the body of a request for a video. Raises ApiError if the body is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        values = _object(await request.body())
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        values = await _form(request, most_bytes)
    else:
        raise ApiError(415, "the body must be application/json or multipart/form-data", code="unsupported_media_type")
    images = {option: _image(values.pop(name, None), name) for name, option in IMAGES.items()}
    return Asked(_checked(values), {option: data for option, data in images.items() if data})


def _object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in a body. Raises ApiError.

    Commas separate all values, so they are counted first: to decode millions of values takes many seconds, in which
    the server would answer nobody.
    """
    if body.count(b",") > _MOST_COMMAS:
        raise _too_many_values()
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if len(values) > _MOST_FIELDS:
        raise _too_many_values()
    return values


def _too_many_values() -> ApiError:
    message = f"the body has too many values: send at most {_MOST_FIELDS} fields, and prompts of {MOST_LETTERS} letters"
    return ApiError(400, message, code="invalid_json")


def _no_constant(name: str) -> None:
    raise ValueError(name)


async def _form(request: Request, most_bytes: int) -> dict[str, Any]:
    try:
        form = await request.form(max_files=len(IMAGES), max_fields=_MOST_FIELDS, max_part_size=most_bytes)
    except (MultiPartException, HTTPException, UnicodeDecodeError):
        message = (
            f"the form is damaged, or has over {_MOST_FIELDS} fields or {len(IMAGES)} files: only {_FILES} can be files"
        )
        raise ApiError(400, message, code="invalid_form") from None
    values: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            field = _NESTED.get(name, name)
            if field in values:
                raise unfit(name[:60], "is given twice: keep one")
            if name in IMAGES and not isinstance(value, UploadFile):
                raise unfit(name, f"is text, not a file: send a file, such as by `curl -F {name}=@star.png`")
            if isinstance(value, UploadFile) and field not in IMAGES:
                raise unfit(name[:60], f"only {_FILES} can be files")
            values[field] = (
                await value.read()
                if isinstance(value, UploadFile)
                else {"image_url": value}
                if name in _NESTED
                else value
            )
    finally:
        await form.close()
    return values


def _image(value: Any, name: str) -> bytes:
    """Returns the bytes of the image that came in the field `name`, empty for none. Raises ApiError.

    The server fetches no address.
    """
    if isinstance(value, bytes) and value:
        return value
    if value is None or value == b"":
        return b""
    if not isinstance(value, dict) or set(value) != {"image_url"} or not isinstance(value["image_url"], str):
        raise unfit(name, 'send a file in a form, or in JSON {"image_url": "data:image/png;base64,..."}')
    head, comma, text = value["image_url"].partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise unfit(name, "the server fetches no address: send the image itself, as data:image/png;base64,...")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise unfit(name, "is not base64: encode the bytes of the file") from None
    if not data:
        raise unfit(name, "is empty: send an image")
    return data


def _checked(values: dict[str, Any]) -> Fields:
    for name, value in values.items():
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise unfit(name[:60], "a text or a number is needed")
    try:
        return Fields.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])[:60] if first["loc"] else "prompt"
    if first["type"] == "extra_forbidden":
        raise unfit(name, f"no such field: use {', '.join([*Fields.model_fields, *IMAGES])}")
    raise unfit(name, "is missing" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:])
