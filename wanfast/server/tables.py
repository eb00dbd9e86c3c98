"""Defines the tables of the server's database, and opens the database: SQLite or PostgreSQL.

The database is set up so that a committed write survives a crash.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine.packages import install

METADATA = MetaData()
JOBS = Table(
    "jobs",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order of arrival
    Column("id", String, nullable=False, unique=True),
    Column("owner", String, nullable=False),  # the hash of an API key
    Column("idempotency_key", String),
    Column("fingerprint", String, nullable=False),  # of the request
    Column("priority", Integer, nullable=False),
    Column("status", String, nullable=False),
    Column("options", String, nullable=False),  # JSON: what `Handle.make` gets beside the images
    Column("model", String, nullable=False),
    Column("size", String, nullable=False),
    Column("seconds", String, nullable=False),
    Column("created_at", Float, nullable=False),  # seconds since the epoch, as all times here
    Column("completed_at", Float),
    Column("expires_at", Float),
    Column("attempts", Integer, nullable=False),
    Column("claim", String),  # names the running attempt
    Column("lease_until", Float),  # then a running attempt counts as lost
    Column("stage", String, nullable=False),
    Column("progress", Integer, nullable=False),  # 0..100
    Column("error_code", String),
    Column("error_message", String),
    Column("output", String),  # the name of the video's files, without suffix
    Column("facts", String),  # JSON: the figures of a video, which are the seconds of each stage, and the plan
    Column("deleted", Boolean, nullable=False),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_status", "status", "priority", "number"),
    Index("jobs_by_owner", "owner", "number"),
    sqlite_autoincrement=True,  # a number is never used again
)
IMAGES = Table(
    "images",
    METADATA,
    Column("job", Integer, primary_key=True),
    Column("option", String, primary_key=True),  # of `Handle.make`, which gets the image
    Column("data", LargeBinary, nullable=False),
)
SCHEMA = Table("wanfast_schema", METADATA, Column("version", Integer, primary_key=True))  # it has one row
VERSION = 2  # of all tables here; a change of a table needs another version
_BUSY_S = 30  # a writer waits this long for another
_OF_POSTGRESQL = {  # a machine that is gone is noticed before a lease ends, and not after hours
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 3, "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}  # fmt: skip
_ADDING = 0x77616E66  # PostgreSQL's lock for the whole length of the queue


def open_database(url: str) -> Engine:
    """Opens the database, and creates its tables if they are missing.

    Raises ConfigError if the database cannot be opened, or if its tables do not have the version VERSION.
    """
    try:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        arguments = {"timeout": _BUSY_S} if is_sqlite else _OF_POSTGRESQL
        arguments = {name: value for name, value in arguments.items() if name not in parsed.query}
        engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=not is_sqlite)
    except (ArgumentError, NoSuchModuleError, ValueError):  # ValueError: a port that is no number
        raise ConfigError("--database is not postgresql://USER@HOST/NAME: fix the URL") from None
    except ImportError as error:
        raise ConfigError(f"--database needs the package {error.name}: run `{install('serve-postgres')}`") from None
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    option = "--data-dir" if is_sqlite else "--database"
    try:
        with engine.begin() as connection:
            lock_adding(connection)
            _create_tables(connection, option)
    except DBAPIError as error:
        words = " ".join(str(error.orig).split())
        fix = "give another folder" if is_sqlite else "fix the URL or the database"
        raise ConfigError(f"{option}: the queue cannot be opened ({words:.200}): {fix}") from None
    return engine


def _create_tables(connection: Connection, option: str) -> None:
    """Creates the tables that are missing, and stores their version. Raises ConfigError for tables of another version.

    Tables without a stored version are of version 1, because servers stored none at first.
    """
    has = inspect(connection).has_table
    if has(JOBS.name) and has(SCHEMA.name):
        found = connection.execute(select(SCHEMA.c.version)).scalar_one_or_none()
    else:
        found = 1 if has(JOBS.name) else VERSION
    if found != VERSION:
        raise ConfigError(
            f"{option}: its queue has tables of version {found}, but this wanfast uses version {VERSION}: use the "
            "release of wanfast that made the queue, or give another folder or database"
        )
    is_new = not has(SCHEMA.name)
    METADATA.create_all(connection)
    if is_new:
        connection.execute(insert(SCHEMA).values(version=VERSION))


def lock_adding(connection: Connection) -> None:
    """Takes a lock in PostgreSQL, so that only one writer at a time adds jobs.

    SQLite needs no such lock, because it allows only one writer at a time.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADDING})


def _set_up_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's own BEGIN, below, and not the module's
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):  # FULL: a commit outlives a loss of power too
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begins a transaction. A writer takes the lock at once, because SQLite may refuse the lock to a former reader."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
