"""Serves two pages: the page that makes videos, and the page that describes the server's HTTP calls.

Both pages are plain files of the package, and anybody may read them without an API key.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

_FOLDER = Path(__file__).parents[1] / "assets/server"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES = {file.name: file for file in _FOLDER.iterdir() if file.suffix in _TYPES}


def add_pages(app: FastAPI) -> None:
    """Adds the pages to an app. The pages hold no video: their scripts request videos with the user's key."""

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return _file("index.html")

    @app.get("/docs", include_in_schema=False)
    def calls() -> FileResponse:
        return _file("docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    def part(name: str) -> FileResponse:
        return _file(name)


def _file(name: str) -> FileResponse:
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], media_type=_TYPES[_FILES[name].suffix])
