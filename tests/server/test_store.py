"""Tests the queue of the server on SQLite and on a real PostgreSQL: its order, its states, and who may change them."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from wanfast.runtime.errors import ConfigError
from wanfast.server import store as store_module
from wanfast.server import tables
from wanfast.server.store import MOST_ATTEMPTS, KeyReusedError, NewJob, QueueFullError, Store, StoredJob
from wanfast.server.tables import IMAGES, JOBS, METADATA

NEW = NewJob(
    owner="a", options={"prompt": "a cat", "seed": 1}, model="tiny", size="64x64", seconds="1", fingerprint="f"
)
MANY = 1000


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


def add(store: Store, **values: Any) -> StoredJob:
    return store.add(dataclasses.replace(NEW, **values), {"image": b"picture"}, MANY)[0]


def again(store: Store, job: StoredJob) -> StoredJob:
    """Returns a job as the database has it now."""
    found = store.find(job.id, job.owner)
    assert found is not None
    return found


def claimed(store: Store) -> StoredJob:
    found = store.claim()
    assert found is not None
    return found[0]


def images(store: Store) -> list[bytes]:
    """Returns the images of all jobs."""
    with store._engine.connect() as connection:
        return list(connection.execute(select(IMAGES.c.data)).scalars())


def test_a_job_is_stored_as_it_was_sent(store: Store) -> None:
    job = add(store, priority=3)
    found = again(store, job)
    assert found == job and found.options == NEW.options
    assert (found.status, found.attempts, found.progress, found.priority) == ("queued", 0, 0, 3)
    assert len(found.id) == len("video_") + 32 and found.id != add(store).id
    assert images(store) == [b"picture"] * 2


def test_jobs_run_by_priority_and_then_by_arrival(store: Store) -> None:
    jobs = [add(store, priority=priority) for priority in (0, 5, 0, 5, -1)]
    assert [store.position(job) for job in jobs] == [2, 0, 3, 1, 4]
    order = [claimed(store).number for _ in jobs]
    assert order == [jobs[index].number for index in (1, 3, 0, 2, 4)]
    assert store.claim() is None
    assert store.counts() == {"queued": 0, "in_progress": 5}


def test_two_workers_never_claim_the_same_job(store: Store) -> None:
    numbers = [add(store).number for _ in range(40)]
    taken: list[int] = []

    def work() -> None:
        while (found := store.claim()) is not None:
            taken.append(found[0].number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == numbers


def test_a_job_ends_once(store: Store) -> None:
    add(store)
    job = claimed(store)
    assert store.hold(job, "high noise", 40)
    assert (again(store, job).stage, again(store, job).progress) == ("high noise", 40)
    assert store.complete(job, "a-file", {"seconds": {"total": 1.5}}, keep_s=60)
    ended = again(store, job)
    assert (ended.status, ended.progress, ended.output) == ("completed", 100, "a-file")
    assert ended.facts == {"seconds": {"total": 1.5}}
    assert ended.completed_at and ended.expires_at == pytest.approx(ended.completed_at + 60)
    assert images(store) == []
    changes: list[Callable[[], object]] = [
        lambda: store.complete(job, "another", {}, 1), lambda: store.fail(job, "x", "y"),
        lambda: store.requeue(job, counts=True), lambda: store.hold(job, "", 0), lambda: store.is_held(job),
        lambda: any(store.recover(all_lost=True)),
    ]  # fmt: skip
    assert not any(change() for change in changes)
    assert again(store, job) == ended


def test_a_failed_job_says_why(store: Store) -> None:
    add(store)
    job = claimed(store)
    assert store.fail(job, "not_finite", "a value is NaN")
    ended = again(store, job)
    assert (ended.status, ended.error_code, ended.error_message) == ("failed", "not_finite", "a value is NaN")
    assert ended.completed_at and ended.expires_at is None and images(store) == []


def test_a_lost_attempt_cannot_change_the_job_that_runs_again(store: Store) -> None:
    add(store)
    lost = claimed(store)
    assert store.recover(all_lost=True) == (1, 0)
    assert not store.is_held(lost) and again(store, lost).status == "queued"
    new, given = store.claim() or (lost, None)
    assert (new.number, new.attempts) == (lost.number, 2) and new.attempt != lost.attempt
    assert not store.complete(lost, "old", {}, 1) and not store.hold(lost, "", 99)
    assert given == {"image": b"picture"} and store.is_held(new)
    assert store.complete(new, "new", {}, 1) and again(store, new).output == "new"


def test_a_job_that_ends_its_server_runs_again_at_most_twice(store: Store) -> None:
    add(store)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        assert claimed(store).attempts == attempt
        assert store.recover(all_lost=True) == ((1, 0) if attempt < MOST_ATTEMPTS else (0, 1))
    assert store.claim() is None
    (job,), _ = store.page("a", 1, None, "asc") or ([], False)
    assert (job.status, job.error_code) == ("failed", "server_error") and "3 times" in str(job.error_message)
    assert images(store) == [] and store.recover(all_lost=True) == (0, 0)


def test_an_attempt_is_lost_if_its_lease_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEASE_S", 0.3)
    add(store)
    job = claimed(store)
    time.sleep(0.2)
    assert store.recover(all_lost=False) == (0, 0) and store.hold(job, "", 1)
    time.sleep(0.2)
    assert store.recover(all_lost=False) == (0, 0)
    time.sleep(0.2)
    assert store.recover(all_lost=False) == (1, 0) and not store.hold(job, "", 2)


def test_servers_whose_clocks_differ_lose_no_attempt(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = Store(postgres), Store(postgres)
    add(ours)
    with monkeypatch.context() as late:
        late.setattr(store_module.time, "time", lambda: 0.0)  # of a machine whose clock was never set
        job = claimed(ours)
        assert other.recover(all_lost=False) == (0, 0) and ours.hold(job, "high noise", 5)
    assert other.recover(all_lost=False) == (0, 0) and ours.is_held(job)
    monkeypatch.setattr(store_module, "LEASE_S", -1.0)
    assert ours.hold(job, "high noise", 6) and other.recover(all_lost=False) == (1, 0)
    for opened in (ours, other):
        opened.close()


def test_an_attempt_that_the_server_stopped_does_not_count(store: Store) -> None:
    first, second = add(store), add(store)
    for _ in range(MOST_ATTEMPTS + 1):
        assert store.requeue(claimed(store), counts=False)
    assert store.requeue(claimed(store), counts=True)
    job = claimed(store)
    assert (job.number, job.attempts) == (first.number, 2)  # in its old place
    assert claimed(store).number == second.number


def test_a_cancelled_job_has_failed_and_its_attempt_is_over(store: Store) -> None:
    running, queued = add(store), add(store)
    job = claimed(store)
    for cancelled in (running, queued):
        shown, has_ended = store.cancel(cancelled.id, "a") or (None, None)
        assert shown and (shown.status, shown.error_code, has_ended) == ("failed", "cancelled", True)
        assert store.cancel(cancelled.id, "a") == (shown, False)
    assert not store.is_held(job) and not store.complete(job, "late", {}, 1)
    assert store.claim() is None and images(store) == []


def test_of_many_cancels_at_once_one_ends_the_job(store: Store) -> None:
    job = add(store)
    with ThreadPoolExecutor(8) as pool:
        ended = list(pool.map(lambda _: store.cancel(job.id, "a"), range(24)))
    assert sum(found[1] for found in ended if found) == 1


def test_a_completed_job_stays_so_if_it_is_cancelled(store: Store) -> None:
    job = add(store)
    store.complete(claimed(store), "file", {}, 60)
    shown, has_ended = store.cancel(job.id, "a") or (None, None)
    assert shown and (shown.status, shown.output, has_ended) == ("completed", "file", False)


def test_a_deleted_job_is_gone_for_its_owner(store: Store) -> None:
    job = add(store)
    running = claimed(store)
    assert store.cancel(job.id, "b", deletes=True) is None
    deleted, has_ended = store.cancel(job.id, "a", deletes=True) or (None, None)
    assert deleted and deleted.status == "in_progress" and has_ended and not store.is_held(running)
    assert store.find(job.id, "a") is None and store.page("a", 9, None, "asc") == ([], False)
    assert store.cancel(job.id, "a", deletes=True) is None


def test_a_deleted_job_leaves_nothing_that_its_request_said(store: Store) -> None:
    job = add(store, options={"prompt": "a secret"})
    store.complete(claimed(store), "file", {"plan": "a secret"}, 60)
    assert store.cancel(job.id, "a", deletes=True)
    with store._engine.connect() as connection:
        rows = connection.execute(select(JOBS)).all()
    assert len(rows) == 1 and "secret" not in str(rows)


def test_a_job_belongs_to_its_owner(store: Store) -> None:
    job = add(store)
    assert store.find(job.id, "b") is None and store.cancel(job.id, "b") is None
    assert store.page("b", 9, None, "desc") == ([], False)
    assert store.page("b", 9, job.id, "desc") is None
    assert again(store, job).status == "queued"


def test_a_job_has_as_many_images_as_it_was_sent(store: Store) -> None:
    for sent in ({}, {"image": b"first", "last_image": b"last"}):
        store.add(NEW, sent, MANY)
        job, given = store.claim() or (None, None)
        assert given == sent and len(images(store)) == len(sent) and job
        assert store.complete(job, "out", {}, 1) and images(store) == []


def test_a_key_names_one_job(store: Store) -> None:
    job = add(store, idempotency_key="k")
    assert store.add(dataclasses.replace(NEW, idempotency_key="k"), {}, MANY) == (job, False)
    assert store.earlier(dataclasses.replace(NEW, idempotency_key="k")) == job
    assert add(store, idempotency_key="k", owner="b").id != job.id
    assert add(store, idempotency_key="l").id != job.id
    for call in (lambda new: store.add(new, {}, MANY), store.earlier):
        with pytest.raises(KeyReusedError):
            call(dataclasses.replace(NEW, idempotency_key="k", fingerprint="g"))
    store.cancel(job.id, "a", deletes=True)
    with pytest.raises(KeyReusedError):
        add(store, idempotency_key="k")


def test_a_key_that_comes_many_times_at_once_names_one_job(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: add(store, idempotency_key="k"), range(24)))
    assert len({job.id for job in jobs}) == 1 and store.counts()["queued"] == 1


def test_a_full_queue_takes_no_job(store: Store) -> None:
    def one_more(_: int) -> bool:
        try:
            return store.add(NEW, {}, 5)[1]
        except QueueFullError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one_more, range(24))) == 5
    store.claim()
    assert one_more(0) and not one_more(0)


def test_pages_follow_each_other(store: Store) -> None:
    jobs = [add(store) for _ in range(5)]
    add(store, owner="b")
    for order, expected in (("asc", jobs), ("desc", jobs[::-1])):
        seen: list[StoredJob] = []
        more = True
        while more:
            found = store.page("a", 2, seen[-1].id if seen else None, order)
            assert found is not None
            seen, more = [*seen, *found[0]], found[1]
        assert seen == expected


def test_a_page_follows_a_job_that_is_deleted(store: Store) -> None:
    jobs = [add(store) for _ in range(3)]
    store.cancel(jobs[1].id, "a", deletes=True)
    assert store.page("a", 9, jobs[1].id, "asc") == ([jobs[2]], False)
    assert store.page("a", 9, jobs[1].id, "desc") == ([jobs[0]], False)
    assert store.page("b", 9, jobs[1].id, "asc") is None


def test_outputs_are_those_that_may_be_read_or_are_being_made(store: Store) -> None:
    for _ in range(4):
        add(store)
    shown, expired, deleted = (claimed(store) for _ in range(3))
    for job, keep_s in ((shown, 60), (expired, -1), (deleted, 60)):
        store.complete(job, job.attempt, {}, keep_s)
    store.cancel(deleted.id, "a", deletes=True)
    running = claimed(store)
    assert store.outputs() == {shown.attempt, running.attempt}


def test_what_ended_long_ago_is_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        add(store)
    store.complete(claimed(store), "file", {}, 60)
    store.fail(claimed(store), "x", "y")
    store.forget()
    assert len((store.page("a", 9, None, "asc") or ([],))[0]) == 3
    monkeypatch.setattr(store_module, "_HISTORY_S", -61.0)
    store.forget()
    assert [job.status for job in (store.page("a", 9, None, "asc") or ([],))[0]] == ["queued"]


def test_jobs_are_there_after_the_database_is_opened_again(url: str) -> None:
    store = Store(url)
    job = add(store)
    store.close()
    store = Store(url)
    assert again(store, job) == job
    store.close()


def test_a_database_has_the_version_of_its_tables(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is refused with one line, and the database stays as it is."""
    store = Store(url)
    number = add(store).number
    store.close()
    monkeypatch.setattr(tables, "VERSION", 3)
    place = "--data-dir" if url.startswith("sqlite") else "--database"
    with pytest.raises(ConfigError, match=f"^{place}: its queue has tables of version 2, but .* uses version 3: use"):
        Store(url)
    monkeypatch.undo()
    store = Store(url)
    assert [job.number for job in store.page("a", 9, None, "desc")[0]] == [number]  # type: ignore[index]
    with store._engine.connect() as connection:
        assert connection.execute(select(tables.SCHEMA.c.version)).scalars().all() == [2]
    store.close()


def test_a_database_without_a_version_is_of_the_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers stored no version at first."""
    store = Store(url)
    add(store)
    with store._engine.begin() as connection:
        tables.SCHEMA.drop(connection)
    store.close()
    with pytest.raises(ConfigError, match="has tables of version 1"):
        Store(url)
    monkeypatch.setattr(tables, "VERSION", 1)
    store = Store(url)
    with store._engine.connect() as connection:
        assert connection.execute(select(tables.SCHEMA.c.version)).scalars().all() == [1]
    assert store.claim() is not None
    store.close()


def test_a_change_of_the_tables_needs_another_version() -> None:
    """If this fails because a table has changed: raise VERSION, and write the new digest here."""
    columns = [
        (table.name, column.name, str(column.type), column.nullable, column.primary_key)
        for table in METADATA.sorted_tables
        for column in table.columns
    ]
    digest = hashlib.sha256(repr(columns).encode()).hexdigest()[:12]
    assert (tables.VERSION, digest) == (2, "834711556e53")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("nothing", "--database is not"),
        ("mysterydb://x", "--database is not"),
        ("postgresql://a@127.0.0.1:port/x", "--database is not"),
        ("postgresql://a@127.0.0.1:99999/x", "--database"),
        ("sqlite:////no/such/folder/jobs", "^--data-dir: the queue cannot be opened .*: give another folder$"),
        ("postgresql+psycopg://nobody@127.0.0.1:1/x", "^--database: the queue cannot be opened"),
        ("oracle+oracledb://x", "--database needs the package oracledb"),
    ],
)
def test_a_wrong_url_is_an_error_of_one_line(wrong: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        Store(wrong)
    assert len(str(error.value).splitlines()) == 1


def test_a_postgresql_that_does_not_answer_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables._OF_POSTGRESQL, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, started = silent.getsockname()[1], time.monotonic()
        with pytest.raises(ConfigError, match="timeout"):
            Store(f"postgresql://a@127.0.0.1:{port}/b")
    assert time.monotonic() - started < 10


def test_a_lost_machine_of_postgresql_is_noticed_before_a_lease_ends(postgres: str) -> None:
    for url, expected in ((postgres, 20_000), (f"{postgres}&tcp_user_timeout=7000", 7000)):
        store = Store(url)
        connection = store._engine.raw_connection()
        driver: Any = connection.dbapi_connection
        options = driver.info.get_parameters()
        connection.close()
        store.close()
        assert int(options["tcp_user_timeout"]) == expected < store_module.LEASE_S * 1000
        assert int(options["keepalives_idle"]) < store_module.LEASE_S


def test_the_file_of_sqlite_is_safe_against_a_loss_of_power(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/jobs.sqlite")
    with store._engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    store.close()
    assert pragmas == ["wal", 2]
