"""Streams the changes of an API key's videos, so that a page follows all these videos with one request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from wanfast.server import replies
from wanfast.server.store import Store
from wanfast.server.worker import Worker

MOST_STREAMS = 64  # of one server; each of them asks the database again and again
MOST_OF_A_KEY = 16  # of these streams, so that one client leaves some to the others
MOST_VIDEOS = 50  # of each kind: not ended, and ended
# Between two looks at the database. A signal inside this process cannot replace them, because servers that share the
# database change its jobs too.
LOOK_S = 0.3
_BEAT_S = 15.0  # an empty line after this time without a change shows that the connection lives


class Changes:
    """This class holds the videos that a stream has sent to a client, and finds what has changed since then."""

    def __init__(self, store: Store, worker: Worker, owner: str) -> None:
        self._store, self._worker, self._owner = store, worker, owner
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
        seen = self._store.overview(self._owner, MOST_VIDEOS)
        videos = {job.id: replies.video(job, seen.places.get(job.number)) for job in [*seen.unended, *seen.ended]}
        changed = [video for name, video in videos.items() if self._sent.get(name) != video]
        left = self._sent.keys() - videos.keys()  # by a deletion, or because others are newer
        deleted = [name for name in sorted(left) if self._store.find(name, self._owner) is None]
        state = {"status": self._worker.status, "queued": len(seen.places)}
        if not changed and not deleted and state == self._state:
            return None
        is_first = not self._state
        self._sent, self._state = videos, state
        older = seen.ended[-1].id if is_first and seen.has_more else None
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
