"""Defines the routes of the server: the video API that OpenAI's client uses, and routes for operators."""

from __future__ import annotations

import asyncio
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from wanfast import __version__
from wanfast.runtime.store.artifacts import note
from wanfast.server import replies
from wanfast.server.changes import MOST_OF_A_KEY, MOST_STREAMS, Changes, Looks, lines
from wanfast.server.checks import Checks
from wanfast.server.fields import IMAGE, LAST, Asked, Fields, read
from wanfast.server.files import Files
from wanfast.server.keys import EVERYBODY, Keys
from wanfast.server.metrics import Metrics
from wanfast.server.middleware import HEADERS, Limits, answer
from wanfast.server.page import add_pages
from wanfast.server.replies import ApiError, unfit
from wanfast.server.store import CANCELLED, FAULT, KeyReusedError, Order, QueueFullError, Store, StoredJob
from wanfast.server.worker import Worker

_ID = re.compile(r"video_[0-9a-f]{32}")
_MOST_LETTERS_OF_A_KEY = 255
_RETRY_S = 10  # a client may try again after this time
_BUSY = {"Retry-After": str(_RETRY_S)}
_LOOK_S = 0.5  # between two looks at the database of a request that waits for its video
_MOST_ADDING = 4  # requests whose images are checked, or whose jobs are written, at once
_LAST_IMAGE = "The image that the video ends with."
_CLIENT_LEFT = 499  # nobody reads this answer
_UNSUPPORTED = ("remix", "edits", "extensions", "characters")
_STATUS_OF_SYNC = {"not_finite": 500, "rank_failed": 500, "server_error": 500, CANCELLED: 409, "invalid_video": 400}


@dataclass(frozen=True)
class Parts:
    """This class holds the objects and the limits that the routes use."""

    store: Store
    worker: Worker
    files: Files
    checks: Checks
    keys: Keys
    metrics: Metrics
    model: str
    most_jobs: int  # that wait
    most_bytes: int  # of a body


def create_app(parts: Parts) -> FastAPI:
    """Returns the ASGI app of a server, with all routes."""
    app = FastAPI(title="wanfast", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Limits, most_bytes=parts.most_bytes, only_loopback=not parts.keys.hashes)
    _add_errors(app)
    _add_videos(app, parts)
    _add_unsupported(app, parts)
    _add_operation(app, parts)
    add_pages(app)
    return app


def _add_videos(app: FastAPI, parts: Parts) -> None:
    store, files = parts.store, parts.files
    owned = Depends(_owner_of(parts.keys))
    adding = CapacityLimiter(_MOST_ADDING)
    takes_fields: dict[str, Any] = {
        "requestBody": {"required": True, "content": _content(takes_images=parts.checks.takes_images)}
    }

    @app.post("/v1/videos", openapi_extra=takes_fields, summary="Queue a video")
    async def create(request: Request, owner: str = owned) -> JSONResponse:
        return await run_in_threadpool(_shown, parts, await _create(request, owner, parts, adding))

    @app.post("/v1/videos/sync", openapi_extra=takes_fields, summary="Make a video and wait for it")
    async def create_and_wait(request: Request, owner: str = owned) -> Response:
        return await _awaited(request, await _create(request, owner, parts, adding), parts)

    @app.get("/v1/videos", summary="List the videos of the API key")
    def list_(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Order = "desc",
        owner: str = owned,
    ) -> dict[str, Any]:
        found = store.page(owner, limit, after, order) if after is None or _ID.fullmatch(after) else None
        if found is None:
            raise unfit("after", "no video of your API key has this id")
        return replies.page(found[0], has_more=found[1])

    streams, of_key = asyncio.Semaphore(MOST_STREAMS), dict[str, asyncio.Semaphore]()
    looks = WeakValueDictionary[str, Looks]()  # by the owner; an owner without a stream has none

    # A path /v1/videos/NAME must stand above /v1/videos/{video_id}, which matches every name. A route without `owned`
    # is open to everybody.
    @app.get(
        "/v1/videos/events",
        summary="Follow the videos of the API key: one line of JSON for each change",
        response_class=StreamingResponse,
    )
    def follow(owner: str = owned) -> StreamingResponse:
        own = of_key.setdefault(owner, asyncio.Semaphore(MOST_STREAMS if owner == EVERYBODY else MOST_OF_A_KEY))
        if streams.locked() or own.locked():
            message = "too many pages are open already: close one, or request each video by its id"
            raise ApiError(429, message, code="too_many_streams", headers=_BUSY)
        changes = Changes(looks.setdefault(owner, Looks(store, owner)), parts.worker)
        found = lines(changes, parts.worker, streams, own)
        return StreamingResponse(found, media_type="application/x-ndjson")

    @app.get("/v1/videos/{video_id}", summary="Show a video")
    def show(video_id: str, owner: str = owned) -> JSONResponse:
        return _shown(parts, _found(store, video_id, owner))

    @app.get("/v1/videos/{video_id}/content", summary="Download a video", response_class=FileResponse)
    def content(video_id: str, variant: str = "video", owner: str = owned) -> FileResponse:
        if variant not in ("video", "thumbnail"):
            raise unfit("variant", "use video or thumbnail")
        return _file(parts, _found(store, video_id, owner), variant)

    @app.post("/v1/videos/{video_id}/cancel", summary="Cancel a video; the list then shows it as failed")
    def cancel(video_id: str, owner: str = owned) -> JSONResponse:
        return _shown(parts, _cancelled(parts, video_id, owner))

    @app.delete("/v1/videos/{video_id}", summary="Delete a video; a video that is being made is cancelled first")
    def remove(video_id: str, owner: str = owned) -> dict[str, Any]:
        job = _cancelled(parts, video_id, owner, deletes=True)
        if job.output is not None:
            files.remove(job.output)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.get("/v1/models", summary="List the model that is loaded")
    def models(owner: str = owned) -> dict[str, Any]:
        model = {"id": parts.model, "object": "model", "created": 0, "owned_by": "wanfast"}
        offer = {**parts.checks.offer(), "max_upload_bytes": parts.most_bytes}
        return {"object": "list", "data": [model | offer]}


def _add_unsupported(app: FastAPI, parts: Parts) -> None:
    """Adds routes for the calls of OpenAI's client that this server does not support; each answers with status 501."""

    def refuse(owner: str = Depends(_owner_of(parts.keys))) -> None:
        raise ApiError(501, f"the server does not support {', '.join(_UNSUPPORTED)}", code="not_implemented")

    for action in _UNSUPPORTED:
        for path in (f"/v1/videos/{action}", f"/v1/videos/{{video_id}}/{action}"):
            app.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)
    app.add_api_route("/v1/videos/characters/{character}", refuse, methods=["GET"], include_in_schema=False)


def _add_operation(app: FastAPI, parts: Parts) -> None:
    owned = Depends(_owner_of(parts.keys))

    # These two take no thread, so that they answer when all threads wait for a database.
    @app.get("/health", summary="Show that the server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Show whether the server takes jobs: status 200 if so, and 503 while the models load")
    async def ready() -> JSONResponse:
        return JSONResponse({"status": parts.worker.status}, 200 if parts.worker.is_ready else 503)

    @app.get("/metrics", summary="Metrics for Prometheus")
    def metrics(owner: str = owned) -> Response:
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(unfit(str(first["loc"][-1])[:60], first["msg"][:1].lower() + first["msg"][1:]))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_LEFT)

    @app.exception_handler(SQLAlchemyError)
    async def unavailable(request: Request, error: SQLAlchemyError) -> JSONResponse:
        message = "the server's database does not answer: try again later"
        return answer(ApiError(503, message, code="unavailable", headers=_BUSY))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        message = "an error of the server; the server's log has the reason"
        return answer(ApiError(500, message, code="server_error", headers=HEADERS))  # `Limits` does not see this answer


def _owner_of(keys: Keys) -> Any:
    async def owner(request: Request) -> str:
        """Returns the owner of the request's jobs: a hash of the API key, or EVERYBODY if the server has no keys.

        Raises ApiError for a missing or wrong API key, before the body is read.
        """
        found = keys.owner(request.headers.get("authorization"))
        if found is None:
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    return owner


async def _create(request: Request, owner: str, parts: Parts, adding: CapacityLimiter) -> StoredJob:
    """Queues the job of a request; the job is on disk when this function returns. Raises ApiError.

    `adding` limits the number of threads that queue jobs. Images are decoded one after the other. Without the limit,
    requests that wait for this could hold all threads, and no thread would answer other requests.
    """
    if not parts.worker.is_ready:
        what = "is stopping" if parts.worker.is_stopping else "is loading the models"
        raise ApiError(503, f"the server {what}: try again later", code="loading", headers=_BUSY)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _MOST_LETTERS_OF_A_KEY:
        raise unfit("Idempotency-Key", f"use 1 to {_MOST_LETTERS_OF_A_KEY} letters")
    return await to_thread.run_sync(_add, await read(request, parts.most_bytes), owner, key, parts, limiter=adding)


def _add(asked: Asked, owner: str, key: str | None, parts: Parts) -> StoredJob:
    new, store = parts.checks.job(asked, owner, key), parts.store
    try:
        if earlier := store.earlier(new):
            return earlier
        parts.checks.plan(new, asked.images)
        job, is_new = store.add(new, asked.images, parts.most_jobs)
    except QueueFullError:
        message = f"the queue is full, because {parts.most_jobs} videos wait: try again later"
        raise ApiError(429, message, code="queue_full", headers=_BUSY) from None
    except KeyReusedError:
        message = "this Idempotency-Key belongs to another request or to a deleted video: use a new key"
        raise ApiError(409, message, code="idempotency_key_reused", param="Idempotency-Key") from None
    if is_new:
        parts.worker.wake()
    return job


async def _awaited(request: Request, job: StoredJob, parts: Parts) -> Response:
    """Returns the file of a job when it has ended.

    If the client leaves, the job is cancelled, unless the request has an Idempotency-Key: with such a key, the client
    can send the request again, and another request may wait for the same job.
    """

    def leave() -> None:
        if "idempotency-key" not in request.headers:
            with suppress(ApiError):  # it was deleted meanwhile
                _cancelled(parts, job.id, job.owner)

    try:
        while not job.has_ended:
            if parts.worker.is_stopping:
                message = f"the server is stopping; after a restart it makes {job.id}"
                raise ApiError(503, message, code="stopping", headers=_BUSY)
            if await request.is_disconnected():
                await run_in_threadpool(leave)
                return Response(status_code=_CLIENT_LEFT)
            await asyncio.sleep(_LOOK_S)
            job = await run_in_threadpool(_found, parts.store, job.id, job.owner)
    except asyncio.CancelledError:  # Ray Serve ends the task of a client that left
        if not parts.worker.is_stopping:
            asyncio.get_running_loop().run_in_executor(None, leave)
        raise
    if job.error_code is not None:
        message = job.error_message or job.error_code
        raise ApiError(_STATUS_OF_SYNC[job.error_code], message, code=job.error_code)
    return _file(parts, job, "video")


def _found(store: Store, video_id: str, owner: str) -> StoredJob:
    job = store.find(video_id, owner) if _ID.fullmatch(video_id) else None
    if job is None:
        raise _missing()
    return job


def _cancelled(parts: Parts, video_id: str, owner: str, *, deletes: bool = False) -> StoredJob:
    """Cancels a job as `Store.cancel` does, counts a job that ended now, and returns the job. Raises ApiError."""
    found = parts.store.cancel(video_id, owner, deletes=deletes) if _ID.fullmatch(video_id) else None
    if found is None:
        raise _missing()
    job, has_ended = found
    parts.metrics.failed(CANCELLED, has_ended)
    return job


def _missing() -> ApiError:
    return ApiError(404, "no such video", code="not_found", param="video_id")


def _shown(parts: Parts, job: StoredJob) -> JSONResponse:
    position = parts.store.position(job) if job.status == "queued" else None
    return JSONResponse(replies.video(job, position), headers={"openai-poll-after-ms": str(replies.POLL_MS)})


def _file(parts: Parts, job: StoredJob, variant: str) -> FileResponse:
    """Returns a file of a completed job, or the ranges of bytes that the request names. Raises ApiError."""
    if job.output is None:
        raise ApiError(
            404, f"there is no file, because this video has the status {job.status}", code="not_ready", param="video_id"
        )
    video = variant == "video"
    path = parts.files.video(job.output) if video else parts.files.thumbnail(job.output)
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        job = _found(parts.store, job.id, job.owner)  # it may have been deleted meanwhile
        if (job.expires_at or 0) <= time.time():
            raise ApiError(404, "this video has expired", code="expired", param="video_id") from None
        note(f"--data-dir: {path} is missing: all servers of one --database must use the same folder")
        message = "the file of this video is missing; the server's log has the reason"
        raise ApiError(500, message, code=FAULT) from None
    name = f"{job.id}{path.suffix}"
    return _Download(opened, media_type="video/mp4" if video else "image/jpeg", filename=name)


class _Download(FileResponse):
    """This response sends an open file, so that the whole file is sent even if the video expires meanwhile."""

    def __init__(self, opened: BinaryIO, *, media_type: str, filename: str) -> None:
        number = opened.fileno()  # its path under /proc names the file even after the file was removed
        super().__init__(
            f"/proc/self/fd/{number}", media_type=media_type, filename=filename, stat_result=os.fstat(number)
        )
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:
            await super().__call__(scope, receive, send)


def _content(*, takes_images: bool) -> dict[str, Any]:
    """Returns the OpenAPI description of a body: JSON, or a form with the images as files.

    If `takes_images` is false, the body has no images.
    """
    schema = Fields.model_json_schema()
    if not takes_images:
        return {kind: {"schema": schema} for kind in ("application/json", "multipart/form-data")}
    url = {"type": "object", "properties": {"image_url": {"type": "string", "description": "a data URL"}}}
    file = {"type": "string", "format": "binary"}

    def with_image(image: dict[str, Any]) -> dict[str, Any]:
        properties = {**schema["properties"], IMAGE: image, LAST: {**image, "description": _LAST_IMAGE}}
        return {"schema": {**schema, "properties": properties, "required": ["prompt", IMAGE]}}

    return {"application/json": with_image(url), "multipart/form-data": with_image(file)}
