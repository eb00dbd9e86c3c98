"""Streams the changes of an API key's videos, so that a page follows all these videos with one request."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from wanfast.server import replies
from wanfast.server.store import Store
from wanfast.server.worker import Worker

MOST_STREAMS = 64  # of one server
MOST_OF_A_KEY = 16  # of these streams, so that one client leaves some to the others
MOST_VIDEOS = 50  # of each kind: not ended, and ended
# Between two looks at the database. A signal inside this process cannot replace them, because servers that share the
# database change its jobs too.
LOOK_S = 0.3
_BEAT_S = 15.0  # an empty line after this time without a change shows that the connection lives


@dataclass(frozen=True)
class Seen:
    """This class holds what one look at the database found, of one owner."""

    videos: dict[str, dict[str, Any]]  # by id; the ended ones come last, the newest of them first
    queued: int  # jobs of all owners
    older: str | None  # the last of the ended videos, if more have ended


class Looks:
    """This class looks at the database for all streams of one owner, at most once in LOOK_S seconds."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._owner, self._looking = store, owner, threading.Lock()
        self._began, self._seen = -math.inf, Seen({}, 0, None)

    def latest(self) -> Seen:
        """Returns what a look found that began less than LOOK_S seconds ago. Raises SQLAlchemyError."""
        with self._looking:
            if (now := time.monotonic()) - self._began >= LOOK_S:
                self._seen, self._began = self._look(), now
            return self._seen

    def is_deleted(self, video: str) -> bool:
        return self._store.find(video, self._owner) is None

    def _look(self) -> Seen:
        found = self._store.overview(self._owner, MOST_VIDEOS)
        videos = {job.id: replies.video(job, found.places.get(job.number)) for job in [*found.unended, *found.ended]}
        return Seen(videos, len(found.places), found.ended[-1].id if found.has_more else None)


class Changes:
    """This class holds the videos that a stream has sent to a client, and finds what has changed since then."""

    def __init__(self, looks: Looks, worker: Worker) -> None:
        self._looks, self._worker = looks, worker
        self._sent: dict[str, dict[str, Any]] = {}  # the videos by id
        self._state: dict[str, Any] = {}

    def look(self) -> dict[str, Any] | None:
        """Returns what has changed since the last look, as a JSON object, or None if nothing has changed.

        A look covers at most `MOST_VIDEOS` videos that have not ended, and the newest `MOST_VIDEOS` ended videos. The
        object has these keys:

        * "status": the server's status.
        * "queued": the number of queued jobs of all owners.
        * "videos": the videos that are new or changed.
        * "deleted": the ids of deleted videos.
        * "older": usually None. If the first look does not cover all ended videos, this is the id of the oldest ended
          video that it covers. `Store.page` takes this id as `after`, and returns the older videos.
        """
        seen = self._looks.latest()
        changed = [video for name, video in seen.videos.items() if self._sent.get(name) != video]
        left = self._sent.keys() - seen.videos.keys()  # by a deletion, or because others are newer
        deleted = [name for name in sorted(left) if self._looks.is_deleted(name)]
        state = {"status": self._worker.status, "queued": seen.queued}
        if not changed and not deleted and state == self._state:
            return None
        older = None if self._state else seen.older
        self._sent, self._state = seen.videos, state
        return {**state, "videos": changed, "deleted": deleted, "older": older}


async def lines(
    changes: Changes, worker: Worker, turn: asyncio.Semaphore, own_turn: asyncio.Semaphore
) -> AsyncIterator[str]:
    """Yields a line of JSON for each change, until the server stops or its database does not answer.

    After 15 seconds without a change, yields an empty line, so that the client knows that the connection is alive.
    `turn` limits the number of all open streams, and `own_turn` limits the number of open streams of one API key.
    """
    async with own_turn, turn:
        written = time.monotonic()
        while True:
            is_last = worker.is_stopping
            try:
                change = await run_in_threadpool(changes.look)
            except SQLAlchemyError:
                return
            if change or time.monotonic() - written > _BEAT_S:
                written = time.monotonic()
                yield f"{json.dumps(change) if change else ''}\n"
            if is_last:
                return
            await asyncio.sleep(LOOK_S)
