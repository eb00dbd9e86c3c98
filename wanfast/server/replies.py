"""Defines the JSON documents that a client gets: a video, a list of videos, and an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from wanfast.runtime.config.option import flag
from wanfast.runtime.errors import JoiningMemoryError
from wanfast.server.store import StoredJob

POLL_MS = 1000  # a client asks again after this time
_FIELD_OF = {  # option of `Handle.make` -> the field that gives it
    "prompt": "prompt", "negative_prompt": "negative_prompt", "size": "size", "frames": "num_frames", "fps": "fps",
    "steps": "num_inference_steps", "guidance_high_noise": "guidance_scale", "guidance_low_noise": "guidance_scale_2",
    "shift": "flow_shift", "seed": "seed", "recipe": "recipe", "image": "input_reference",
    "last_image": "last_image",
}  # fmt: skip
_FLAG = re.compile("|".join(f"{flag(name)}(?![\\w-])" for name in _FIELD_OF))
_PATH = re.compile(r"(?<![\w.<])~?/[\w.-]+/")  # the beginning of a path of two or more parts


class ApiError(Exception):
    """This error becomes the HTTP response: a status, and a message that names the field and the fix."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def document(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unfit(param: str, message: str) -> ApiError:
    """Returns the error for a field with a wrong value; half of a surrogate pair in the field's name becomes a "?"."""
    param = param.encode(errors="replace").decode()  # JSON may name such a field, but no answer can be sent with it
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def in_fields(error: Exception, paths: Iterable[str] = ()) -> tuple[str, str | None]:
    """Replaces the options in an error's message by the request's fields, such as --steps by num_inference_steps.

    `paths`: paths of the server's machine; they are removed from the message, because the client must not see them. A
    fix that is a command of the server's machine is removed too.
    Returns (the new message, the first field in this message). If the message names no field, the second value is None.
    """
    if isinstance(error, JoiningMemoryError):  # a request gives no clips, but the seconds of all of them
        return f"seconds: {error.need}: ask for fewer seconds, or for a smaller size", "seconds"
    message, command, _ = str(error).partition(": run `wanfast ")
    message += ": ask the operator of this server" if command else ""
    for path in sorted(paths, key=len, reverse=True):  # a path may be the beginning of another one
        message = message.replace(f" {path}", "")
    first = _FLAG.search(message)
    return _FLAG.sub(lambda found: _field(found[0]), message), _field(first[0]) if first else None


def in_names_of_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {field of a request: value} for the options that a request can give and that have a value."""
    return {field: options[option] for option, field in _FIELD_OF.items() if options.get(option) is not None}


def _field(option: str) -> str:
    return _FIELD_OF[option[2:].replace("-", "_")]


def without_paths(message: str, instead: str) -> str:
    """Returns `message`; if the message contains a path of this machine, returns `instead`."""
    return instead if _PATH.search(message) else message


def video(job: StoredJob, queue_position: int | None = None) -> dict[str, Any]:
    """Returns what the client gets for a job: the JSON object of a video.

    `queue_position`: the number of queued jobs before this job; None if this job is not queued.
    """
    error = None if job.error_code is None else {"code": job.error_code, "message": job.error_message}
    settings = _settings(job)
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "prompt": settings["prompt"],
        "remixed_from_video_id": None,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "queued_at": job.created_at,  # with fractions of a second, which give an order
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "size": job.size,
        "seconds": job.seconds,
        "error": error,
        "seed": job.options["seed"],
        "priority": job.priority,
        "settings": settings,
        "stage": job.stage or None,
        "queue_position": queue_position,
        "seconds_by_stage": job.facts.get("seconds_by_stage"),
        "plan": job.facts.get("plan"),
    }


def _settings(job: StoredJob) -> dict[str, Any]:
    """Returns the fields of a request that gives the same video on this server."""
    settings = in_names_of_fields(job.options)
    if not isinstance(settings["prompt"], list):
        return settings
    del settings["num_frames"]  # of one of the clips
    return settings | {"prompt": settings["prompt"][0], "seconds": job.seconds}


def page(jobs: list[StoredJob], *, has_more: bool) -> dict[str, Any]:
    """Returns one page of a client's list of videos, as a JSON object."""
    first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
    return {
        "object": "list",
        "data": list(map(video, jobs)),
        "first_id": first,
        "last_id": last,
        "has_more": has_more,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
