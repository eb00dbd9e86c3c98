"""Stores the jobs of the server in a database; every change of a job's state is one transaction.

    queued -> in_progress -> completed | failed

`claim` starts an attempt and names it (`StoredJob.attempt`). The worker must give this name with each later change of
the running job. So an attempt that was cancelled or lost can no longer end the job, and a job ends exactly once. A
cancelled job is a failed job with the error code `cancelled`. An attempt is lost if its process ended, or did not renew
the lease within LEASE_S seconds. The job of a lost attempt is queued again. After MOST_ATTEMPTS attempts that were
lost, or whose ranks failed, the job fails.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    Row,
    Update,
    and_,
    cast,
    delete,
    extract,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)

from wanfast.server.tables import IMAGES, JOBS, lock_adding, open_database

Status = Literal["queued", "in_progress", "completed", "failed"]
Order = Literal["asc", "desc"]

MOST_ATTEMPTS = 3
LEASE_S = 30.0
CANCELLED = "cancelled"
FAULT = "server_error"  # the code of an error that no request causes
_HISTORY_S = 30 * 86400.0  # a job that ended is remembered this long after its video has expired
_LOST = f"the server ended {MOST_ATTEMPTS} times while it made this video"


class QueueFullError(Exception):
    """This error means that the queue already holds the largest allowed number of waiting jobs."""


class KeyReusedError(Exception):
    """This error means that an Idempotency-Key was used before: for another request, or for a deleted video."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """This class holds a checked request that is not in the database yet."""

    owner: str
    options: Mapping[str, Any]
    model: str
    size: str
    seconds: str
    fingerprint: str
    idempotency_key: str | None = None
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """This class holds one job, with the values that the database has for it."""

    number: int
    id: str
    owner: str
    fingerprint: str
    priority: int
    status: Status
    options: dict[str, Any]
    model: str
    size: str
    seconds: str
    created_at: float
    completed_at: float | None
    expires_at: float | None
    attempts: int
    claim: str | None
    stage: str
    progress: int
    error_code: str | None
    error_message: str | None
    output: str | None
    facts: dict[str, Any]
    deleted: bool

    @classmethod
    def of(cls, row: Row[Any]) -> StoredJob:
        """Makes a job from a row of the table."""
        values = {field.name: row._mapping[field.name] for field in dataclasses.fields(cls)}
        return cls(**values | {"options": json.loads(values["options"]), "facts": json.loads(values["facts"] or "{}")})

    @property
    def attempt(self) -> str:
        """Returns the name of the job's current attempt; no other attempt has this name."""
        return f"{self.id}-{self.claim}"

    @property
    def has_ended(self) -> bool:
        return self.status in ("completed", "failed")


@dataclass(frozen=True)
class Overview:
    """This class holds the jobs that the server's page shows to one owner."""

    unended: list[StoredJob]  # in the order in which they are made
    ended: list[StoredJob]  # the last that came is the first
    has_more: bool  # whether more have ended
    places: dict[int, int]  # of all queued jobs, of other owners too: {number: how many come before}


class Store:
    """This class stores the jobs of all servers that share a database. Any thread may call its methods."""

    def __init__(self, url: str) -> None:
        """Opens the database. Raises ConfigError."""
        self._engine = open_database(url)

    @property
    def is_shared(self) -> bool:
        """Returns whether other servers may use the same database."""
        return self._engine.dialect.name != "sqlite"

    def close(self) -> None:
        self._engine.dispose()

    def add(self, new: NewJob, images: Mapping[str, bytes], most: int) -> tuple[StoredJob, bool]:
        """Queues a job and returns (the job, True).

        `images`: the content of each image file of the job, by the option of `Handle.make` that gets the image.
        If an earlier job has the same owner and the same Idempotency-Key, returns (the earlier job, False). Raises
        KeyReusedError if the earlier job was made from a different request or was deleted. Raises QueueFullError if
        the number of waiting jobs is `most` or larger.
        """
        with self._writing() as connection:
            lock_adding(connection)
            if earlier := self._of_key(connection, new):
                return earlier, False
            waiting = select(func.count()).select_from(JOBS).where(JOBS.c.status == "queued")
            if connection.execute(waiting).scalar_one() >= most:
                raise QueueFullError
            values = dataclasses.asdict(new) | {"options": json.dumps(dict(new.options))}
            state = {"status": "queued", "attempts": 0, "stage": "", "progress": 0, "deleted": False}
            row = connection.execute(
                insert(JOBS)
                .values(id=f"video_{secrets.token_hex(16)}", created_at=time.time(), **values, **state)
                .returning(JOBS)
            ).one()
            if images:
                rows = [{"job": row.number, "option": option, "data": data} for option, data in images.items()]
                connection.execute(insert(IMAGES), rows)
        return StoredJob.of(row), True

    def earlier(self, new: NewJob) -> StoredJob | None:
        """Returns the earlier job with the Idempotency-Key of this request, or None if there is none.

        Raises KeyReusedError if the earlier job came from a different request, or if it was deleted.
        """
        with self._reading() as connection:
            return self._of_key(connection, new)

    def find(self, video: str, owner: str) -> StoredJob | None:
        """Returns a job by its id; None if no such job exists, if it was deleted, or if it belongs to another owner."""
        with self._reading() as connection:
            row = connection.execute(select(JOBS).where(_visible(owner), JOBS.c.id == video)).one_or_none()
        return StoredJob.of(row) if row else None

    def page(self, owner: str, limit: int, after: str | None, order: Order) -> tuple[list[StoredJob], bool] | None:
        """Returns (up to `limit` jobs of an owner, whether more jobs follow).

        `after`: the id of the last job of the previous page; this job may be deleted meanwhile. Returns None if `after`
        is not a job of the owner.
        """
        number = JOBS.c.number
        chosen = select(JOBS).where(_visible(owner)).order_by(number if order == "asc" else number.desc())
        with self._reading() as connection:
            if after is not None:
                last = connection.execute(select(number).where(JOBS.c.owner == owner, JOBS.c.id == after)).scalar()
                if last is None:
                    return None
                chosen = chosen.where(number > last if order == "asc" else number < last)
            rows = connection.execute(chosen.limit(limit + 1)).all()
        return [StoredJob.of(row) for row in rows[:limit]], len(rows) > limit

    def position(self, job: StoredJob) -> int:
        """Returns the number of queued jobs that will run before the queued `job`."""
        earlier = and_(JOBS.c.priority == job.priority, JOBS.c.number < job.number)
        before = and_(JOBS.c.status == "queued", or_(JOBS.c.priority > job.priority, earlier))
        with self._reading() as connection:
            return connection.execute(select(func.count()).select_from(JOBS).where(before)).scalar_one()

    def overview(self, owner: str, most: int) -> Overview:
        """Returns up to `most` jobs of an owner that have not ended, and up to `most` of the owner's ended jobs."""
        number, status, mine = JOBS.c.number, JOBS.c.status, select(JOBS).where(_visible(owner))
        order = (status, JOBS.c.priority.desc(), number)  # in_progress comes before queued
        with self._reading() as connection:
            places = connection.execute(select(number).where(status == "queued").order_by(*order)).scalars().all()
            unended = connection.execute(mine.where(_unended()).order_by(*order).limit(most)).all()
            ended = connection.execute(mine.where(~_unended()).order_by(number.desc()).limit(most + 1)).all()
        return Overview(
            [StoredJob.of(row) for row in unended],
            [StoredJob.of(row) for row in ended[:most]],
            len(ended) > most,
            {number: place for place, number in enumerate(places)},
        )

    def counts(self) -> dict[str, int]:
        """Returns {status: number of jobs} for the two statuses `queued` and `in_progress`."""
        found = select(JOBS.c.status, func.count()).group_by(JOBS.c.status)
        with self._reading() as connection:
            rows = connection.execute(found.where(_unended())).all()
        return {"queued": 0, "in_progress": 0} | {row[0]: row[1] for row in rows}

    def claim(self) -> tuple[StoredJob, dict[str, bytes]] | None:
        """Starts an attempt of the next queued job; returns (the job, its images), or None if no job is queued.

        The images are those that `add` got. The next job is the one with the highest priority; among jobs of equal
        priority, the oldest.
        """
        following = (
            select(JOBS.c.number)
            .where(JOBS.c.status == "queued")
            .order_by(JOBS.c.priority.desc(), JOBS.c.number)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._writing() as connection:
            if (number := connection.execute(following).scalar_one_or_none()) is None:
                return None
            values = {"claim": secrets.token_hex(8), "lease_until": self._lease(), "stage": "", "progress": 0}
            begun = update(JOBS).where(JOBS.c.number == number)
            begun = begun.values(status="in_progress", attempts=JOBS.c.attempts + 1, **values)
            of_job = select(IMAGES.c.option, IMAGES.c.data).where(IMAGES.c.job == number)
            images = {row.option: row.data for row in connection.execute(of_job)}
            return StoredJob.of(connection.execute(begun.returning(JOBS)).one()), images

    def is_held(self, job: StoredJob) -> bool:
        """Returns whether `job.attempt` still owns the job.

        Returns False if the job has ended (also by `cancel`), or if `recover` or `requeue` has queued the job again.
        """
        with self._reading() as connection:
            return connection.execute(select(JOBS.c.number).where(_held(job))).one_or_none() is not None

    def hold(self, job: StoredJob, stage: str, progress: int) -> bool:
        """Renews the lease of `job.attempt`, and records its stage and its progress in percent.

        Returns False if `job.attempt` no longer owns the job.
        """
        return self._change(job, stage=stage, progress=progress, lease_until=self._lease())

    def complete(self, job: StoredJob, output: str, facts: Mapping[str, Any], keep_s: float) -> bool:
        """Ends a job as completed; returns False if `job.attempt` no longer owns the job.

        The caller must have written the video's files before this call.
        `output`: the name of the attempt that made the files. `facts`: figures for the client, namely the seconds of
        each stage and the plan. `keep_s`: the seconds until the video expires.
        """
        now = time.time()
        ended = {"output": output, "facts": json.dumps(facts), "progress": 100, "stage": "", "expires_at": now + keep_s}
        return self._change(job, status="completed", completed_at=now, claim=None, **ended)

    def fail(self, job: StoredJob, code: str, message: str) -> bool:
        """Ends a job with an error; returns False if `job.attempt` no longer owns the job."""
        return self._change(job, **_failed(code, message))

    def requeue(self, job: StoredJob, *, counts: bool) -> bool:
        """Puts a running job back to its old place in the queue; returns False if `job.attempt` no longer owns the job.

        `counts`: whether this attempt counts towards MOST_ATTEMPTS. Pass False if the server itself stopped the
        attempt.
        """
        return self._change(job, **_queued(), attempts=job.attempts if counts else job.attempts - 1)

    def recover(self, *, all_lost: bool) -> tuple[int, int]:
        """Queues the jobs of lost attempts again; returns (the number of queued jobs, the number of failed jobs).

        A job that has used all its MOST_ATTEMPTS attempts fails instead, with the code FAULT. If `all_lost` is true,
        every running attempt counts as lost. Otherwise, an attempt is lost if its lease has expired.
        """
        expired = JOBS.c.lease_until < self._now()
        lost = and_(JOBS.c.status == "in_progress", true() if all_lost else expired)
        with self._writing() as connection:
            over = update(JOBS).where(lost, JOBS.c.attempts >= MOST_ATTEMPTS).values(**_failed(FAULT, _LOST))
            failed = self._end(connection, over)
            again = connection.execute(update(JOBS).where(lost).values(**_queued()))
        return again.rowcount, failed

    def cancel(self, video: str, owner: str, *, deletes: bool = False) -> tuple[StoredJob, bool] | None:
        """Cancels a job; returns (the job, whether this call ended it), or None if the owner has no such job.

        A queued or running job ends with the error code `cancelled`. A job that has already ended keeps its status.
        If `deletes` is true, the owner can no longer see the job, and its prompt, other options and `facts` are
        removed. The returned job then has the status, options and `facts` from before the call.
        """
        mine = and_(_visible(owner), JOBS.c.id == video)
        with self._writing() as connection:
            row = connection.execute(select(JOBS).where(mine).with_for_update()).one_or_none()
            if row is None:
                return None
            change = update(JOBS).where(mine, _unended()).values(**_failed(CANCELLED, "cancelled"))
            has_ended = self._end(connection, change) == 1
            if deletes:
                connection.execute(update(JOBS).where(mine).values(deleted=True, options="{}", facts=None))
                return StoredJob.of(row), has_ended
            return StoredJob.of(connection.execute(select(JOBS).where(mine)).one()), has_ended

    def outputs(self) -> set[str]:
        """Returns the names of the attempts whose files must be kept.

        An attempt's files are kept while the attempt runs, and while its video can be downloaded.
        """
        shown = and_(JOBS.c.output.is_not(None), JOBS.c.deleted.is_(False), JOBS.c.expires_at > time.time())
        with self._reading() as connection:
            rows = connection.execute(select(JOBS).where(or_(shown, JOBS.c.status == "in_progress"))).all()
        return {row.output or StoredJob.of(row).attempt for row in rows}

    def forget(self) -> None:
        """Removes old jobs: a failed job 30 days after it ended, any other job 30 days after its video expired."""
        long_ago = time.time() - _HISTORY_S
        old = or_(JOBS.c.expires_at < long_ago, and_(JOBS.c.expires_at.is_(None), JOBS.c.completed_at < long_ago))
        with self._writing() as connection:
            connection.execute(delete(JOBS).where(JOBS.c.status.in_(("completed", "failed")), old))

    def _of_key(self, connection: Connection, new: NewJob) -> StoredJob | None:
        if new.idempotency_key is None:
            return None
        same = and_(JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
        row = connection.execute(select(JOBS).where(same)).one_or_none()
        if row is not None and (row.deleted or row.fingerprint != new.fingerprint):
            raise KeyReusedError
        return StoredJob.of(row) if row else None

    def _change(self, job: StoredJob, **values: Any) -> bool:
        with self._writing() as connection:
            return self._end(connection, update(JOBS).where(_held(job)).values(**values)) == 1

    def _end(self, connection: Connection, change: Update) -> int:
        """Changes jobs, removes the images of ended jobs, and returns the number of changed jobs."""
        rows = connection.execute(change.returning(JOBS.c.number, JOBS.c.status)).all()
        ended = [row.number for row in rows if row.status in ("completed", "failed")]
        if ended:
            connection.execute(delete(IMAGES).where(IMAGES.c.job.in_(ended)))
        return len(rows)

    def _now(self) -> ColumnElement[float]:
        """Returns the time by the clock of a shared database, because the clocks of the servers may differ."""
        return cast(extract("epoch", func.clock_timestamp()), Float) if self.is_shared else literal(time.time())

    def _lease(self) -> ColumnElement[float]:
        return self._now() + LEASE_S

    def _writing(self) -> AbstractContextManager[Connection]:
        return self._engine.begin()

    def _reading(self) -> AbstractContextManager[Connection]:
        return self._engine.execution_options(reads=True).begin()


def _visible(owner: str) -> ColumnElement[bool]:
    return and_(JOBS.c.owner == owner, JOBS.c.deleted.is_(False))


def _unended() -> ColumnElement[bool]:
    return JOBS.c.status.in_(("queued", "in_progress"))


def _held(job: StoredJob) -> ColumnElement[bool]:
    return and_(JOBS.c.number == job.number, JOBS.c.claim == job.claim)  # an end removes the claim


def _queued() -> dict[str, Any]:
    return {"status": "queued", "claim": None, "lease_until": None, "stage": "", "progress": 0}


def _failed(code: str, message: str) -> dict[str, Any]:
    ended = {"status": "failed", "claim": None, "stage": "", "completed_at": time.time()}
    return {**ended, "error_code": code, "error_message": message}
