"""Refuses requests with too large bodies and, for a server without keys, requests from pages of other sites."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanfast.server.replies import ApiError
from wanfast.server.settings import is_loopback

_POLICY = (  # of the pages; an answer that is no page has no use for it
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {  # of every answer
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_ENCODED = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


class Limits:
    """This ASGI middleware refuses bodies that are too large and, with `only_loopback`, requests from other sites.

    `most_bytes`: the largest allowed size of a body. Content-Length is checked, and the bytes that arrive are counted.
    `only_loopback`: whether to refuse a request whose Host is not a loopback address, or whose Origin is another host.
    Pass True for a server without keys. Otherwise, a web page of another site could use the server from the user's
    browser. The middleware also adds security headers to every answer, such as Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, *, only_loopback: bool) -> None:
        self._app, self._most_bytes, self._only_loopback = app, most_bytes, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        length, received = headers.get("content-length", "0"), 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise self._too_large()
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_ENCODED]
            await send(message)

        try:
            if self._only_loopback:
                _check_origin(headers)
            if not length.isdecimal() or int(length) > self._most_bytes:
                raise self._too_large()
        except ApiError as error:
            await answer(error)(scope, receive, marked)
            return
        await self._app(scope, counted, marked)

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self._most_bytes / 1e6:g} MB: send a smaller image"
        return ApiError(413, message, code="too_large", headers={"connection": "close"})


def answer(error: ApiError) -> JSONResponse:
    """Converts an error to the HTTP response that the client gets."""
    return JSONResponse(error.document(), error.status, headers=error.headers)


def _check_origin(headers: Mapping[str, str]) -> None:
    """Raises ApiError if a request's Host is not a loopback address, or if its Origin is another site."""
    host = headers.get("host", "")
    try:
        name, origin = urlsplit(f"//{host}").hostname, headers.get("origin")
        of_page = None if origin is None else urlsplit(origin).netloc
    except ValueError:
        raise ApiError(400, "the header Host or Origin is not an address", code="wrong_host") from None
    if not is_loopback(name or ""):
        raise ApiError(
            403,
            "without --api-key-file, the server answers only requests to localhost: use localhost",
            code="wrong_host",
        )
    if of_page not in (None, host):
        raise ApiError(403, "pages of other sites may not use this server", code="wrong_origin")
