"""Tests what the server does when something fails: ranks, memory, the disk, the database, or the server itself."""

from __future__ import annotations

import dataclasses
import errno
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from sqlalchemy.exc import OperationalError

from tests.attention_plan import store_a_plan
from tests.server.running import SMALL, STAR, WARM_UP, Running, StandIn, data_url, running, until
from wanfast.runtime.errors import CancelledError, ConfigError, MissingArtifactError, NotFiniteError, RankFailedError
from wanfast.runtime.media.video_file import Mp4Writer
from wanfast.runtime.processes.handle import Opened
from wanfast.server import app as app_module
from wanfast.server import store as store_module
from wanfast.server import worker as worker_module
from wanfast.server.checks import Checks, Served
from wanfast.server.files import Files
from wanfast.server.keys import Keys
from wanfast.server.serve import parts_of, warm_up_of
from wanfast.server.settings import ServerSettings
from wanfast.server.store import MOST_ATTEMPTS, NewJob, Store


def test_jobs_run_on_postgresql_too(tmp_path: Path, postgres: str) -> None:
    with running(tmp_path, postgres) as server:
        videos = [server.create() for _ in range(3)]
        assert [server.ended(video)["status"] for video in videos] == ["completed"] * 3


def test_a_job_whose_ranks_die_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path) as server:
        server.maker.errors += [RankFailedError("rank 0 was killed; logs in /tmp/x/logs")] * (MOST_ATTEMPTS - 1)
        video = server.ended(server.create(seed=5))
        assert video["status"] == "completed" and len(server.maker.made) == MOST_ATTEMPTS
        assert server.metric("wanfast_rank_failures_total") == MOST_ATTEMPTS - 1
    assert "rank 0 was killed; logs in /tmp/x/logs" in capsys.readouterr().err


def test_a_job_that_kills_its_ranks_each_time_fails_alone(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.maker.errors += [RankFailedError("rank 0 was killed; logs in /tmp/x/logs")] * MOST_ATTEMPTS
        first, second = server.create(), server.create()
        error = server.ended(first)["error"]
        assert error == {
            "code": "rank_failed",
            "message": "the server could not make this video; the server's log has the reason",
        }
        assert server.ended(second)["status"] == "completed"
        assert server.metric('wanfast_failures_total{code="rank_failed"}') == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NotFiniteError("the latents hold NaN after step 3"), "not_finite", "the latents hold NaN after step 3"),
        (ConfigError("--size 64x64: does not fit: use fewer --frames"), "invalid_video",
         "size 64x64: does not fit: use fewer num_frames"),
        (ConfigError("--artifacts-dir /srv/secret/place: is full"), "server_error", "the server's log has the reason"),
        (MissingArtifactError("no curve"), "server_error", "the server's log has the reason"),
        (ZeroDivisionError("a bug at /srv/secret/place"), "server_error", "the server's log has the reason"),
    ],
    ids=["nan", "memory", "path", "missing", "bug"],
)  # fmt: skip
def test_an_error_costs_one_job(
    tmp_path: Path, error: Exception, code: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path) as server:
        server.maker.errors.append(error)
        first, second = server.create(), server.create()
        shown = server.ended(first)["error"]
        assert shown["code"] == code and words in shown["message"] and "secret" not in shown["message"]
        assert server.ended(second)["status"] == "completed"
    assert str(error).split()[-1] in capsys.readouterr().err


def test_a_video_that_cannot_be_written_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as server:
        write = type(server.files).write_thumbnail

        def full(*arguments: Any) -> None:
            monkeypatch.setattr(type(server.files), "write_thumbnail", write)
            raise ConfigError("--data-dir /x/y: cannot be written (No space left on device)")

        monkeypatch.setattr(type(server.files), "write_thumbnail", full)
        error = server.ended(server.create())["error"]
        assert (error["code"], error["message"]) == (
            "server_error", "the server could not make this video; the server's log has the reason",
        )  # fmt: skip
        assert server.ended(server.create())["status"] == "completed"


def test_ranks_that_die_while_they_decode_leave_nothing_half_written(tmp_path: Path, early_files: None) -> None:
    with running(tmp_path) as server:

        def dies() -> None:
            until(lambda: half_written(server))
            server.maker.decoding = lambda: left.extend(server.files.listed())
            raise RankFailedError("rank 0 was killed; logs in /tmp/x/logs")

        left: list[Path] = []
        server.maker.decoding = dies
        video = server.ended(server.create(seed=5))
        assert video["status"] == "completed" and len(server.maker.made) == 2
        assert {file.name.lstrip(".").partition(".")[0] for file in left} == {
            next(server.files.folder.glob("video_*.mp4")).stem
        }
        assert sorted(file.suffix for file in server.files.listed()) == [".jpg", ".json", ".mp4"]


def test_a_video_that_is_cancelled_while_it_is_decoded_leaves_no_file(tmp_path: Path, early_files: None) -> None:
    with running(tmp_path) as server:

        def cancelled() -> None:
            until(lambda: half_written(server))
            server.ask("POST", f"/v1/videos/{video}/cancel")
            until(server.maker.cancelled.is_set)
            raise CancelledError

        server.maker.holds.set()
        video = server.create()
        server.maker.decoding = cancelled
        server.maker.holds.clear()
        assert server.ended(video)["error"]["code"] == "cancelled"
        until(lambda: not server.worker._runs)
        assert server.files.listed() == []


def test_a_disk_that_becomes_full_while_a_video_is_decoded_costs_this_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, failed = Mp4Writer._encode, threading.Event()

    def full(self: Mp4Writer, frames: Any) -> None:
        monkeypatch.setattr(Mp4Writer, "_encode", encode)
        self._path.touch()
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    with running(tmp_path) as server:
        monkeypatch.setattr(Mp4Writer, "_encode", full)
        server.maker.decoding = lambda: (failed.wait(20), time.sleep(0.05))  # so that the next frames are refused
        error = server.ended(server.create())["error"]
        assert (error["code"], error["message"]) == (
            "server_error", "the server could not make this video; the server's log has the reason",
        )  # fmt: skip
        assert not [file for file in server.files.listed() if ".mp4" in file.name]
        assert server.ended(server.create())["status"] == "completed"
    assert "cannot be written (No space left on device" in capsys.readouterr().err


def test_the_half_written_file_of_a_running_job_is_not_swept(
    tmp_path: Path, early_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.05)
    with running(tmp_path) as server:
        other = server.files.folder / f".video_{'0' * 32}-1.mp4.77.part"

        def decodes() -> None:
            until(lambda: half_written(server))
            other.touch()
            until(lambda: not other.exists())
            assert half_written(server)

        server.maker.decoding = decodes
        assert server.ended(server.create())["status"] == "completed"


@pytest.fixture
def early_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creates the file of a video with its first frame; x264 holds back more frames than these videos have."""
    begin = Mp4Writer._open
    monkeypatch.setattr(Mp4Writer, "_open", lambda self, *shape: (begin(self, *shape), self._path.touch()))


def half_written(server: Running) -> list[Path]:
    """Returns the mp4 files that x264 writes."""
    return [file for file in server.files.listed() if file.name.endswith(".part") and ".mp4." in file.name]


def test_the_queue_waits_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_module, "_IDLE_S", 0.02)
    with running(tmp_path) as server:
        with monkeypatch.context() as full:
            full.setattr(type(server.files), "free_bytes", lambda self: 64 * 64 * 3 * 13 * 3 // 2 - 1)  # 3 clips
            time.sleep(0.1)
            videos = [server.create() for _ in range(2)]
            time.sleep(0.2)
            assert [server.show(video)["status"] for video in videos] == ["queued"] * 2
        assert [server.ended(video)["status"] for video in videos] == ["completed"] * 2
    assert capsys.readouterr().err.count("less than 239.6 kB are free, so the queue waits") == 1


def test_a_log_that_cannot_be_written_costs_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the log may be full."""
    monkeypatch.setattr(worker_module, "_IDLE_S", 0.02)
    with Path("/dev/full").open("w", buffering=1) as full, running(tmp_path) as server:
        monkeypatch.setattr(sys, "stderr", full)
        with monkeypatch.context() as no_room:
            no_room.setattr(type(server.files), "free_bytes", lambda self: 0)
            until(lambda: not server.worker._had_room)
        server.maker.errors += [ConfigError("a bad option"), ZeroDivisionError("a bug")]
        videos = [server.create() for _ in range(3)]
        assert [server.ended(video)["status"] for video in videos] == ["failed", "failed", "completed"]
        assert not server.errors
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_an_error_of_the_writer_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    with running(tmp_path) as server:
        monkeypatch.setattr(type(server.worker), "_finish", broken)
        videos = [server.create() for _ in range(3)]
        assert [server.ended(video)["status"] for video in videos[1:]] == ["failed", "completed"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_folder_that_fails_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network disk may do so; jobs must stay watched, so that they can be cancelled."""
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.05)
    failed: list[bool] = []

    def broken(self: object) -> list[Path]:
        failed.append(True)
        raise OSError(errno.ESTALE, "Stale file handle")

    with running(tmp_path) as server:
        server.maker.holds.set()
        video = server.create()
        with monkeypatch.context() as patched:
            patched.setattr(type(server.files), "listed", broken)
            until(lambda: failed)
        server.ask("POST", f"/v1/videos/{video}/cancel")
        until(lambda: server.maker.cancelled.is_set() or not server.worker._runs)
    assert (
        "note: --data-dir: the file system reports an error ([Errno 116] Stale file handle)" in capsys.readouterr().err
    )


def test_a_job_that_is_made_again_while_its_lost_video_is_written_stays_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the clock had jumped over the lease of the first attempt."""
    monkeypatch.setattr(worker_module, "_IDLE_S", 0.02)
    writes = threading.Event()
    with running(tmp_path) as server:
        write = type(server.files).write_thumbnail
        monkeypatch.setattr(
            type(server.files), "write_thumbnail", lambda *arguments: (writes.wait(20), write(*arguments))[1]
        )
        video = server.create()
        until(lambda: server.show(video)["stage"] == "writing")
        server.maker.holds.set()
        server.store.recover(all_lost=True)
        until(lambda: len(server.maker.made) == 2)
        writes.set()
        until(lambda: len(server.worker._runs) == 1)
        assert server.show(video)["status"] == "in_progress"
        server.ask("POST", f"/v1/videos/{video}/cancel")
        until(lambda: not server.worker._runs)
        server.maker.holds.clear()
        assert server.ended(server.create())["status"] == "completed"
        assert server.show(video)["error"]["code"] == "cancelled"


def test_ranks_that_cannot_start_end_the_server_and_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def dead(self: StandIn, **options: Any) -> None:
        calls.append(options["prompt"])
        raise RankFailedError("no GPU")

    with running(tmp_path) as server:
        monkeypatch.setattr(StandIn, "make", dead)
        video = server.create()
        until(lambda: server.errors)
        assert isinstance(server.errors[0], RankFailedError) and calls == ["a star", *[WARM_UP] * 3]
        found = server.store.find(video, "everybody")
        assert found and (found.status, found.attempts) == ("queued", 1)


def test_a_full_queue_is_refused_with_a_time(tmp_path: Path) -> None:
    with running(tmp_path, most_jobs=2) as server:
        server.maker.holds.set()
        first = server.create()
        until(lambda: server.show(first)["status"] == "in_progress")
        waiting = [server.create() for _ in range(2)]
        answer = server.ask("POST", "/v1/videos", prompt="a", input_reference=data_url(STAR.read_bytes()))
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["Retry-After"]) > 0
        assert server.metric('wanfast_jobs{status="queued"}') == 2
        server.ask("DELETE", f"/v1/videos/{waiting[0]}")
        server.create()
        server.maker.holds.clear()
        assert server.ended(waiting[1])["status"] == "completed"


def test_many_pictures_at_once_hold_no_other_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes, began = threading.Event(), threading.Semaphore(0)
    plan = Checks.plan

    def slow(checks: Checks, new: NewJob, picture: bytes) -> None:
        began.release()
        decodes.wait(20)
        plan(checks, new, picture)

    with running(tmp_path) as server, ThreadPoolExecutor(45) as pool:
        made = server.create()
        monkeypatch.setattr(Checks, "plan", slow)
        videos = [pool.submit(server.create) for _ in range(45)]  # more than threads
        assert began.acquire(timeout=10)
        time.sleep(0.5)  # for the others to arrive
        started = time.monotonic()
        server.show(made)
        assert server.ask("GET", "/ready").status == 200
        took_s = time.monotonic() - started
        decodes.set()
        assert len({video.result() for video in videos}) == 45 and took_s < 1


def test_a_database_that_holds_all_threads_leaves_health_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), threading.Semaphore(0)

    def silent(*arguments: Any) -> None:
        asked.release()
        answers.wait(20)

    with running(tmp_path) as server, ThreadPoolExecutor(60) as pool:
        monkeypatch.setattr(Store, "find", silent)
        shown = [pool.submit(server.ask, "GET", "/v1/videos/video_" + "0" * 32) for _ in range(60)]
        assert all(asked.acquire(timeout=10) for _ in range(40))  # as many as there are threads
        started = time.monotonic()
        assert [server.ask("GET", path).status for path in ("/health", "/ready")] == [200, 200]
        took_s = time.monotonic() - started
        answers.set()
        assert {answer.result().status for answer in shown} == {404} and took_s < 1


def test_a_server_that_loads_or_stops_takes_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path, waits=False) as server:
        for state, retry in (("loading", True), ("ready", False), ("stopping", True)):
            if state == "ready":
                server.maker.holds.clear()
                until(lambda: server.worker.is_ready)
                kept = server.create()
                server.ended(kept)
            elif state == "stopping":
                until(lambda: not any(server.store.counts().values()))
                server.worker.stop()
                assert "note: the server is stopping: no video is being made; " in capsys.readouterr().err
            answer = server.ask("POST", "/v1/videos", prompt="a", input_reference=data_url(STAR.read_bytes()))
            assert (answer.status == 503) == retry == ("Retry-After" in answer.headers)
            shown = server.ask("GET", "/ready")
            assert (shown.status, shown.document["status"]) == (503 if retry else 200, state)
            assert server.ask("GET", "/health").status == 200
        assert server.show(kept)["status"] == "completed"


def test_a_stop_queues_the_running_job_again_and_waits_for_written_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = threading.Event()
    with running(tmp_path) as server:
        write = type(server.files).write_thumbnail
        monkeypatch.setattr(
            type(server.files), "write_thumbnail", lambda *arguments: (writes.wait(20), write(*arguments))[1]
        )
        written = server.create()
        until(lambda: server.show(written)["stage"] == "writing")
        server.maker.holds.set()
        running_ = server.create()
        until(lambda: len(server.maker.made) == 2)
        assert (
            server.show(running_)["seconds_by_stage"] is server.show(running_)["plan"] is None
        )  # as docs/serve.md says
        for _ in range(2):
            server.worker.stop()
        assert capsys.readouterr().err == (
            f"note: the server is stopping: {running_} stops at its next step and is queued again; finished videos are "
            "written\n"
        )
        until(lambda: server.show(running_)["status"] == "queued")
        server.thread.join(0.2)
        assert server.show(written)["stage"] == "writing" and server.thread.is_alive()
        writes.set()
        server.thread.join()
        assert server.show(running_)["status"] == "queued"
        assert server.show(written)["status"] == "completed"
    assert not server.errors
    store = Store(f"sqlite:///{tmp_path}/data/jobs.sqlite")
    found = store.find(running_, "everybody")
    assert found and (found.status, found.attempts) == ("queued", 0)
    store.close()
    with running(tmp_path) as server:
        assert server.ended(running_)["status"] == "completed"


def test_a_lost_attempt_of_another_server_is_found(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.2)
    other = Store(postgres)
    with running(tmp_path, postgres) as server:
        server.maker.holds.set()
        kept = server.create()
        until(lambda: server.show(kept)["status"] == "in_progress")
        new = NewJob(
            owner="everybody",
            options=kept_options(other, kept),
            model="tiny",
            size="64x64",
            seconds="1",
            fingerprint="",
        )
        lost, _ = other.add(new, {"image": STAR.read_bytes()}, 100)
        monkeypatch.setattr(other, "_lease", lambda: other._now() + 0.1)  # LEASE_S would change the server's leases too
        assert other.claim()
        until(lambda: server.show(lost.id)["status"] == "queued")
        assert server.show(kept)["status"] == "in_progress"
        server.maker.holds.clear()
        assert server.ended(lost.id)["status"] == "completed"
    other.close()


def kept_options(store: Store, video: str) -> dict[str, Any]:
    found = store.find(video, "everybody")
    assert found
    return found.options


def test_a_lease_is_renewed_while_a_step_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEASE_S", 0.5)
    monkeypatch.setattr(worker_module, "_RENEW_S", 0.1)
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.1)
    with running(tmp_path) as server:
        server.maker.holds.set()
        video = server.create()
        until(lambda: server.show(video)["status"] == "in_progress")
        time.sleep(1)
        server.maker.holds.clear()
        assert server.ended(video)["status"] == "completed" and len(server.maker.made) == 1


def test_a_database_that_fails_for_a_moment_costs_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as server:
        complete, failures = Store.complete, iter(range(1))

        def broken(*arguments: Any) -> bool:
            if next(failures, None) is not None:
                raise OperationalError("UPDATE", {}, Exception("the connection is gone"))
            return complete(*arguments)

        monkeypatch.setattr(Store, "complete", broken)
        monkeypatch.setattr(worker_module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda s: None}))
        assert server.ended(server.create())["status"] == "completed"


def test_a_database_that_fails_after_a_claim_ends_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image comes with the job, so that no read of the database can fail between a claim and a video."""
    with running(tmp_path) as server:
        claim, fails = Store.claim, threading.Event()

        def failing(store: Store) -> Any:
            found = claim(store)
            if found:
                fails.set()
            return found

        def reading(store: Store) -> Any:
            if fails.is_set():
                raise OperationalError("SELECT", {}, Exception("the connection is gone"))
            return store._engine.execution_options(reads=True).begin()

        monkeypatch.setattr(Store, "claim", failing)
        monkeypatch.setattr(Store, "_reading", reading)
        monkeypatch.setattr(worker_module, "_DATABASE_S", 0.5)
        video = server.create()
        until(lambda: server.maker.made, 3)
        monkeypatch.undo()
        assert server.ended(video)["status"] == "completed" and len(server.maker.made) == 1


def test_a_database_that_does_not_answer_is_an_error_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as server:

        def broken(*arguments: Any) -> None:
            raise OperationalError("SELECT secret", {}, Exception("the connection is gone"))

        monkeypatch.setattr(Store, "find", broken)
        answer = server.ask("GET", "/v1/videos/video_" + "0" * 32)
        assert (answer.status, answer.error["code"]) == (503, "unavailable") and b"secret" not in answer.body


def test_videos_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.1)
    with running(tmp_path, keep_s=60) as server:
        video = server.ended(server.create())["id"]
        assert server.ask("GET", f"/v1/videos/{video}/content").status == 200
        later = {"time": lambda: time.time() + 61}
        for module in (store_module, app_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **later}))
        until(lambda: not list(server.files.folder.glob("video_*")))
        answer = server.ask("GET", f"/v1/videos/{video}/content")
        assert (answer.status, answer.error["code"]) == (404, "expired")
        assert server.show(video)["status"] == "completed"


@pytest.mark.parametrize("variant", ["video", "thumbnail"])
def test_a_video_that_expires_while_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Before its file is opened, it is an expired video; after that, the whole file is sent."""
    found, file_of = app_module._found, app_module._file
    sent: list[app_module._Download] = []
    with running(tmp_path) as server:
        video = server.ended(server.create())["id"]
        path = f"/v1/videos/{video}/content?variant={variant}"
        whole = server.ask("GET", path).body

        def expiring(*arguments: Any) -> Any:
            sent.append(file_of(*arguments))
            for file in server.files.listed():
                file.rename(tmp_path / file.name)
            return sent[-1]

        for headers, status, body in (({}, 200, whole), ({"Range": "bytes=4-9"}, 206, whole[4:10])):
            with monkeypatch.context() as patch:
                patch.setattr(app_module, "_file", expiring)
                answer = server.ask("GET", path, headers=headers)
            assert (answer.status, answer.body) == (status, body)
            until(lambda: sent[-1]._opened.closed)
            for file in tmp_path.glob("video_*"):
                file.rename(server.files.folder / file.name)

        def lost(*arguments: Any) -> Any:
            job = found(*arguments)
            server.files.remove(job.output)
            return dataclasses.replace(job, expires_at=time.time())

        monkeypatch.setattr(app_module, "_found", lost)
        answer = server.ask("GET", path)
        assert (answer.status, answer.error["code"]) == (404, "expired")


def test_a_video_that_is_missing_before_it_expires_is_a_fault_of_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as server:
        video = server.ended(server.create())["id"]
        for file in server.files.listed():
            file.unlink()
        answer = server.ask("GET", f"/v1/videos/{video}/content")
        assert (answer.status, answer.error["code"]) == (500, "server_error")
        assert "is missing: all servers of one --database must use the same folder" in capsys.readouterr().err
        of_job = app_module._file

        def deleted(*arguments: Any) -> Any:
            server.store.cancel(video, "everybody", deletes=True)
            return of_job(*arguments)

        monkeypatch.setattr(app_module, "_file", deleted)
        answer = server.ask("GET", f"/v1/videos/{video}/content")
        assert (answer.status, answer.error["code"]) == (404, "not_found")


def test_files_that_dead_servers_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.1)
    folder = tmp_path / "data"
    folder.mkdir()
    left = [
        f"video_{'0' * 32}-{'1' * 16}.mp4",
        f".video_{'0' * 32}-{'1' * 16}.mp4.77.part",
        f"video_{'0' * 32}-2.image",
        f"video_{'0' * 32}-2.last_image",
    ]
    for name in left:
        (folder / name).touch()
    with running(tmp_path) as server:
        until(lambda: not any((folder / name).exists() for name in left))
        video = server.ended(server.create())["id"]
        time.sleep(0.3)
        assert server.ask("GET", f"/v1/videos/{video}/content").status == 200
    assert (folder / "jobs.sqlite").exists()


def test_jobs_that_lost_all_their_attempts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SWEEP_S", 0.05)
    monkeypatch.setattr(worker_module, "MOST_ATTEMPTS", 1)
    monkeypatch.setattr(store_module, "MOST_ATTEMPTS", 1)
    with running(tmp_path) as server:
        monkeypatch.setattr(store_module, "LEASE_S", -1.0)
        server.maker.holds.set()
        assert server.ended(server.create())["error"]["code"] == "server_error"
        until(lambda: server.metric('wanfast_failures_total{code="server_error"}') == 1)


def test_jobs_that_the_next_server_fails_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MOST_ATTEMPTS", 1)
    settings = ServerSettings(host="127.0.0.1", port=0, data_dir=tmp_path)
    store = Store(settings.database_url)
    new = NewJob(owner="a", options={}, model="tiny", size="64x64", seconds="1", fingerprint="f")
    store.add(new, {}, 1)
    assert store.claim()
    store.close()
    opened = Opened.of({**SMALL, "artifacts_dir": str(tmp_path / "artifacts")})
    with parts_of(settings, Keys(), opened, {"steps": 3}, start=StandIn) as parts:  # type: ignore[arg-type]
        assert 'wanfast_failures_total{code="server_error"} 1.0' in parts.metrics.text().decode()


def test_the_metrics_say_what_was_made(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        for _ in range(2):
            server.ended(server.create())
        until(lambda: server.metric("wanfast_completed_total") == 2)
        assert server.metric('wanfast_forwards_total{kind="computed"}') == 12
        assert server.metric('wanfast_stage_seconds_count{stage="denoise"}') == 2
        assert server.metric('wanfast_stage_seconds_sum{stage="denoise"}') == pytest.approx(0.04)
        assert server.metric('wanfast_stage_seconds_count{stage="write"}') == 2
        assert server.metric('wanfast_stage_seconds_count{stage="total"}') == 0


def test_the_memory_of_gpus_is_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanfast.runtime.machine.gpus import Gpu
    from wanfast.server import metrics

    monkeypatch.setattr(metrics, "visible_gpus", lambda: [Gpu("H100", 80, 30, "580", (9, 0), 18)])
    store = Store(f"sqlite:///{tmp_path}/jobs.sqlite")
    text = metrics.Metrics(store, has_gpus=True).text().decode()
    assert 'wanfast_gpu_memory_bytes{gpu="0",kind="used"} 50.0' in text and 'kind="total"} 80.0' in text
    store.close()


def test_a_picture_of_the_warm_up_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that share a folder write it while others read it."""
    with running(tmp_path) as server:
        picture = server.files.folder / "warm-up.png"
        before = picture.read_bytes()

        def full(image: Image.Image, path: Path, *arguments: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched, pytest.raises(ConfigError, match=r"--data-dir .*No space left"):
            patched.setattr(Image.Image, "save", full)
            warm_up_of(server.maker.opened, Served.of(server.maker.opened, {"steps": 3}, 3), server.files)
        assert picture.read_bytes() == before and not list(server.files.folder.glob(".warm-up*"))


def test_two_servers_of_one_process_id_write_the_picture_of_the_warm_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers in containers often have the same id."""
    opened = Opened.of({**SMALL, "artifacts_dir": str(tmp_path / "artifacts")})
    served, files, save = Served.of(opened, {"steps": 3}, 3), Files(tmp_path / "data"), Image.Image.save

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        save(*arguments)
        warm_up_of(opened, served, files)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    warm_up_of(opened, served, files)
    assert [file.name for file in files.folder.iterdir()] == ["warm-up.png"]


def test_a_wrong_default_is_refused_before_the_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--magcache"), running(tmp_path, defaults={"magcache_k": 3}):
        pass


@pytest.mark.parametrize("own", [{"attention": "fa3-fp8"}, {"recipe": "near-exact", "quantize_on_the_fly": True}])
def test_attention_in_float8_is_warmed_up_in_few_steps(tmp_path: Path, own: dict[str, Any]) -> None:
    """By default, the first and the last eighth of the steps are exact, which would be both steps of a warm-up."""
    with running(tmp_path, defaults={"steps": 40}, options={**SMALL, **own}) as server:
        opened = server.maker.opened
        plan = opened.plan(warm_up_of(opened, Served.of(opened, {"steps": 40}, 3), server.files))
        assert plan.fp8 is not None and [plan.fp8.is_fp8(step, 0) for step in range(2)] == [True, False]
        assert len(plan.schedule) == 2


@pytest.mark.parametrize("has_plan", [False, True])
def test_sparse_attention_is_warmed_up_in_few_steps(tmp_path: Path, has_plan: bool) -> None:
    """Its guard would make all steps of a warm-up dense, and a plan of attention is for as many steps as its clips."""
    defaults = {"steps": 4}
    video = {**SMALL, **defaults, "image": str(STAR), "prompt": "a star"}
    own = {"attention_plan": store_a_plan(video, tmp_path / "artifacts")} if has_plan else {"density": 0.5}
    sparse = {**SMALL, "attention": "sparse", "dense_share": 0.7, **own}
    with running(tmp_path, defaults=defaults, options=sparse) as server:
        opened = server.maker.opened
        served = Served.of(opened, defaults, 3)
        plan = opened.plan(warm_up_of(opened, served, server.files))
        assert plan.sparsity is not None and plan.sparsity.dense_steps == 0
        assert len(plan.schedule) == 2 and plan.config.models.attention_plan is None
        whole = opened.plan({**defaults, "image": str(STAR), "prompt": "a star"})
        assert (whole.densities is not None) is has_plan and whole.sparsity.density == plan.sparsity.density
