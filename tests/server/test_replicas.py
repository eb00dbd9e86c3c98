"""Tests `wanfast serve --ray`: one replica in this process, and (`make test-long`) replicas on simulated machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.processes.test_cluster import isolated
from tests.ray_nodes import ROOT, Nodes, nodes
from tests.server.running import SMALL, STAR, StandIn, data_url, until
from wanfast.runtime.errors import RankFailedError
from wanfast.runtime.processes.handle import Opened
from wanfast.server import replicas, serve
from wanfast.server.keys import Keys
from wanfast.server.replicas import Replica
from wanfast.server.settings import ServerSettings
from wanfast.server.store import NewJob

__all__ = ["isolated"]

TINY = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "4")
DATABASE = ("--database", "postgresql://USER@HOST/NAME")


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Lets replicas start stand-ins for handles, and returns them."""
    found: list[StandIn] = []

    def start(opened: Opened) -> StandIn:
        found.append(StandIn(opened))
        return found[-1]

    real = serve.parts_of
    monkeypatch.setattr(replicas, "parts_of", lambda *parts: real(*parts, start=start))  # type: ignore[arg-type]
    return found


def replica(folder: Path) -> Replica:
    settings = ServerSettings(host="127.0.0.1", port=8000, data_dir=folder / "data")
    return Replica(settings, Keys(), {**SMALL, "artifacts_dir": str(folder / "artifacts")}, {"steps": 3})


def add(server: Replica) -> str:
    options = {"prompt": "a star", "size": "64x64", "frames": 5, "fit": "crop", "steps": 3, "seed": 1}
    new = NewJob(owner="everybody", options=options, model="tiny", size="64x64", seconds="1", fingerprint="x")
    job, _ = server._parts.store.add(new, {"image": STAR.read_bytes()}, 10)
    server._parts.worker.wake()
    return job.id


def status(server: Replica, video: str) -> str:
    job = server._parts.store.find(video, "everybody")
    assert job
    return job.status


def test_a_replica_is_a_whole_server_with_loaded_models(workdir: Path, makers: list[StandIn]) -> None:
    server = replica(workdir)
    assert server._parts.worker.is_ready
    video = add(server)
    until(lambda: status(server, video) == "completed")
    assert any(getattr(route, "path", "") == "/v1/videos" for route in server.__serve_build_asgi_app__().routes)
    server.check_health()
    server.__del__()
    assert makers[0].closed
    with pytest.raises(RuntimeError, match="the worker has ended"):
        server.check_health()


def test_a_replica_stores_no_text(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Noted(StandIn):
        def __init__(self, opened: Opened, **named: Any) -> None:
            super().__init__(opened)
            asked.append(named)

    monkeypatch.setattr(serve, "Handle", Noted)
    replica(workdir).__del__()
    assert asked == [{"stores_texts": False}]


def test_a_replica_that_ends_queues_its_video_again(workdir: Path, makers: list[StandIn]) -> None:
    server = replica(workdir)
    makers[0].holds.set()
    video = add(server)
    until(lambda: makers[0].made)
    server._parts.worker.stop()
    server._thread.join()
    job = server._parts.store.find(video, "everybody")
    assert job and (job.status, job.attempts) == ("queued", 0)
    server.__del__()


def test_a_replica_whose_models_do_not_load_does_not_start(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(StandIn):
        def make(self, **options: Any) -> Any:
            raise RankFailedError("rank 0 failed")

    real = serve.parts_of
    monkeypatch.setattr(replicas, "parts_of", lambda *parts: real(*parts, start=Broken))  # type: ignore[arg-type]
    with pytest.raises(RankFailedError, match="rank 0 failed"):
        replica(workdir)


@dataclass
class Serve:
    """Stands in for Ray Serve, whose application goes through `statuses`; then the command gets SIGTERM."""

    statuses: list[str | Exception]  # "NONE": somebody deleted the application; "HANGS": the head does not answer
    is_running: bool = False
    options: dict[str, Any] | None = None
    http: Any = None
    ended: bool = False
    has_signalled: bool = False
    error: Exception | None = None  # of the shutdown

    def status(self) -> Any:
        if self.http is None:
            return SimpleNamespace(proxies={"head": "HEALTHY"} if self.is_running else {}, applications={})
        if not self.statuses and not self.has_signalled:  # a second signal would end this process
            self.has_signalled = True
            os.kill(os.getpid(), signal.SIGTERM)
        now = self.statuses.pop(0) if self.statuses else "RUNNING"
        if now == "HANGS":
            threading.Event().wait(5)
        if isinstance(now, Exception):
            raise now
        if now == "NONE":
            return SimpleNamespace(applications={})
        deployment = SimpleNamespace(message="Traceback\n  ConfigError: the disk is full\n")
        return SimpleNamespace(
            applications={"wanfast": SimpleNamespace(status=now, deployments={"wanfast": deployment})}
        )

    def start(self, *, proxy_location: str, http_options: Mapping[str, Any]) -> None:
        self.http = proxy_location, dict(http_options)

    def ingress(self) -> Any:
        return lambda kind: kind

    def deployment(self, kind: Any, **options: Any) -> Any:
        assert kind is Replica
        self.options = options
        return SimpleNamespace(bind=lambda *parts: parts)

    def RunTarget(self, target: Any, *, name: str) -> Any:  # noqa: N802 - its name in Ray
        return target

    def run_many(self, targets: list[Any], **options: bool) -> None:
        self.bound = targets[0]

    def shutdown(self) -> None:
        self.ended = True
        if self.error:
            raise self.error


@pytest.fixture
def on(workdir: Path, wanfast: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, postgres: str) -> Any:
    """Returns `on(serve, *words, cores=)`, which serves on a stand-in for a cluster."""

    def run(engine: Serve, *words: str, cores: tuple[int, ...] = (4, 4)) -> Outcome:
        machines = [{"Alive": True, "Resources": {"CPU": float(number)}} for number in cores]
        module = SimpleNamespace(serve=engine, nodes=lambda: machines)

        @contextmanager
        def connected(address: str) -> Iterator[Any]:
            yield module

        monkeypatch.setitem(sys.modules, "ray", module)
        monkeypatch.setattr(replicas, "connected", connected)
        monkeypatch.setattr(replicas, "_LOOK_S", 0.01)
        return wanfast("serve", *TINY, "--ray", "head:6379", "--database", postgres, *words)

    return run


def test_each_replica_gets_the_ranks_of_one_machine(on: Any) -> None:
    engine = Serve(["DEPLOYING", "RUNNING", "RUNNING"])
    outcome = on(engine, "--replicas", "2", "--num-gpus", "2", "--port", "8123")
    assert outcome.exit_code == 0, outcome.err
    assert outcome.out == "ready at http://127.0.0.1:8123\n" and engine.ended
    assert engine.http == ("HeadOnly", {"host": "127.0.0.1", "port": 8123})
    assert engine.options and engine.options["num_replicas"] == 2
    assert engine.options["placement_group_strategy"] == "STRICT_PACK"
    assert engine.options["placement_group_bundles"] == [{"CPU": 2.0}]
    assert engine.options["ray_actor_options"]["num_cpus"] == 2
    settings, keys, asked, defaults = engine.bound
    assert (asked["num_gpus"], asked["device"], defaults) == (2, "cpu", {"steps": 4}) and keys == Keys()
    assert settings.database.startswith("postgresql")


def test_without_a_number_the_cluster_is_filled(on: Any) -> None:
    engine = Serve(["RUNNING"])
    assert on(engine, "--num-gpus", "2", cores=(4, 3, 1)).exit_code == 0
    assert engine.options and engine.options["num_replicas"] == 3


def test_replicas_that_cannot_start_end_the_command(on: Any) -> None:
    engine = Serve(["DEPLOYING", "DEPLOY_FAILED"])
    outcome = on(engine)
    assert outcome.exit_code == 5 and engine.ended
    assert "error: --ray: the replicas cannot start (Traceback ConfigError: the disk is full)" in outcome.err


def test_a_change_of_the_replicas_is_noted_once(on: Any) -> None:
    outcome = on(Serve(["RUNNING", "UNHEALTHY", "UNHEALTHY", "RUNNING"]))
    assert outcome.out.count("http://") == 1
    assert outcome.err.count("note: --ray: the replicas are unhealthy") == 1
    assert outcome.err.count("note: --ray: the replicas are running") == 1


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        (["RUNNING", "NONE"], "somebody ended the application wanfast of Ray Serve: run this command again"),
        (["RUNNING", "DELETING"], "somebody ended the application wanfast of Ray Serve: run this command again"),
        (["RUNNING", OSError("the head\n is gone")], "the cluster does not answer (the head is gone): start a cluster"),
        ([RuntimeError()], "the cluster does not answer (RuntimeError): start a cluster"),
        (["RUNNING", "HANGS"], "the cluster does not answer (no answer in 0.2 s): start a cluster"),
    ],
    ids=["deleted", "deleting", "head lost", "never there", "head hangs"],
)
def test_an_application_that_is_gone_ends_the_command_with_one_line(
    on: Any, monkeypatch: pytest.MonkeyPatch, statuses: list[str | Exception], words: str
) -> None:
    monkeypatch.setattr(replicas, "_ANSWER_S", 0.2)
    engine = Serve(statuses)
    outcome = on(engine)
    assert outcome.exit_code == 5 and engine.ended == words.startswith("somebody")
    assert f"error: --ray: {words}" in outcome.err and "Traceback" not in outcome.err


def test_replicas_that_cannot_be_ended_are_noted(on: Any) -> None:
    outcome = on(Serve(["RUNNING"], error=OSError("the head is gone")))
    assert outcome.exit_code == 0
    assert "note: --ray: the replicas may still run (the head is gone): run `serve shutdown`" in outcome.err


def test_a_serve_of_others_is_left_alone(on: Any) -> None:
    engine = Serve([], is_running=True)
    outcome = on(engine)
    assert outcome.exit_code == 2 and not engine.ended
    assert "error: --ray: Ray Serve runs on this cluster already" in outcome.err


def test_more_replicas_than_room_are_refused(on: Any) -> None:
    outcome = on(Serve([]), "--replicas", "3", "--num-gpus", "4")
    assert outcome.exit_code == 2
    assert "error: --replicas 3: --ray head:6379 has room for 2 replicas: use 2, or more machines" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--replicas", "2"), "--replicas needs a cluster: add --ray ADDRESS, or drop --replicas"),
        (("--ray", "auto", *DATABASE, "--replicas", "0"), "--replicas 0: use 1 or more"),
        (("--ray", "auto"), "--ray needs --database postgresql://USER@HOST/NAME, because SQLite cannot be shared"),
        (("--ray", "auto", *DATABASE, "--port", "0"), "--port 0: Ray Serve cannot choose a port"),
    ],
    ids=["no cluster", "none", "sqlite", "any port"],
)
def test_options_that_do_not_fit_are_refused(
    wanfast: Callable[..., Outcome], workdir: Path, words: tuple[str, ...], message: str
) -> None:
    outcome = wanfast("serve", *TINY, *words)
    assert outcome.exit_code == 2 and f"error: {message}" in outcome.err


def test_the_first_signal_ends_the_replicas_and_the_second_one_would_say_what_it_leaves(
    on: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signals themselves are tested in tests/machine/test_signals.py."""

    @contextmanager
    def stopped_by_signals(stop: Callable[[], None], before_end: Callable[[], None]) -> Iterator[None]:
        before_end()
        stop()
        yield

    monkeypatch.setattr(replicas, "stopped_by_signals", stopped_by_signals)
    engine = Serve(["RUNNING"])
    outcome = on(engine)
    assert outcome.exit_code == 0 and engine.ended
    assert "note: --ray: the replicas may still run (the command was ended): run `serve shutdown`" in outcome.err


# On simulated machines

_ASK = """
import sys, urllib.error, urllib.request
method, url, body = sys.argv[1:]
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(url, method=method, data=body.encode() or None, headers=headers)
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        sys.stdout.buffer.write(answer.read())
except (urllib.error.URLError, OSError) as error:
    sys.exit(str(error))
"""


def ask(on: Nodes, method: str, path: str, **fields: Any) -> bytes | None:
    """Returns the body of the server's answer, or None if it has none."""
    command = on.inside(sys.executable, "-c", _ASK, method, f"http://127.0.0.1:8123{path}")
    done = subprocess.run([*command, json.dumps(fields) if fields else ""], capture_output=True)
    return None if done.returncode else done.stdout


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_videos_of_a_lost_machine_are_made_by_the_others(isolated: None, workdir: Path, postgres: str) -> None:
    """Two replicas on three machines; the machine of one is lost while it makes a video."""
    words = ("--replicas", "2", "--port", "8123", "--database", postgres, "--data-dir", str(workdir / "data"))
    with nodes(0, 1, 1) as machines, (workdir / "errors").open("w+") as errors:
        command = machines.inside(sys.executable, "-m", "wanfast", "serve", *TINY, "--ray", machines.address, *words)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=workdir, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout
        line = process.stdout.readline()
        assert line == "ready at http://127.0.0.1:8123\n", (workdir / "errors").read_text()
        assert json.loads(ask(machines, "GET", "/ready") or b"{}") == {"status": "ready"}
        assert len({rank.ppid() for rank in machines.ranks() if rank.ppid() != 1}) >= 2

        def create(steps: int, seed: int) -> str:
            picture = {"input_reference": data_url(STAR.read_bytes())}
            made = ask(machines, "POST", "/v1/videos", prompt="a star", seed=seed, num_inference_steps=steps, **picture)
            assert made
            return str(json.loads(made)["id"])

        def shown(video: str) -> Any:
            return json.loads(ask(machines, "GET", f"/v1/videos/{video}") or b"{}")

        videos = [create(200, seed) for seed in range(2)] + [create(4, seed) for seed in range(2, 6)]
        until(lambda: all(shown(video).get("progress", 0) > 0 for video in videos[:2]), 60)
        machines.kill(2)
        until(lambda: all(shown(video).get("status") == "completed" for video in videos), 200)
        for video in videos:
            assert (ask(machines, "GET", f"/v1/videos/{video}/content") or b"")[4:8] == b"ftyp"
        fields = {"prompt": "a star", "num_inference_steps": 200, "input_reference": data_url(STAR.read_bytes())}
        words = ("-c", _ASK.replace("timeout=60", "timeout=2"), "POST", "http://127.0.0.1:8123/v1/videos/sync")
        assert subprocess.run(
            machines.inside(sys.executable, *words, json.dumps(fields)), capture_output=True
        ).returncode
        last = json.loads(ask(machines, "GET", "/v1/videos?limit=1") or b"{}")["data"][0]["id"]
        assert last not in videos
        until(lambda: (shown(last).get("error") or {}).get("code") == "cancelled", 10)  # its client has left
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (workdir / "errors").read_text()
        assert not machines.ranks()
