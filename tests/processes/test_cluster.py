"""Tests `wanfast generate --ray`: with a stand-in for Ray, and (`make test-long`) on simulated machines."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.media.test_earlier_video import write as write_video
from tests.ray_nodes import ROOT, Nodes, can_isolate, nodes
from wanfast.runtime.config import OutputConfig
from wanfast.runtime.errors import ConfigError, MissingArtifactError, RankFailedError, failure
from wanfast.runtime.media.earlier_video import earlier_frames
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.processes import cluster
from wanfast.runtime.processes.remote import Delivered
from wanfast.runtime.store import model_files

TINY = ("--model", "tiny", "--device", "cpu", "--image", "cat.png", "--prompt", "a cat", "--size", "64x64")
LIST = (*TINY, "--frames", "5", "--steps", "2", "--jobs", "jobs.jsonl")
Wanfast = Callable[..., Outcome]


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class ActorDiedError(RayError):
    pass


@dataclass
class Machine:
    """Holds what happens on a simulated machine; each list is used up, and then all goes well."""

    name: str
    checks: list[Any] = field(default_factory=list)  # errors of the weights, or exceptions
    lines: list[Any] = field(default_factory=list)  # results of lines, or exceptions
    cores: int = 1
    is_alive: bool = True
    made: list[str] = field(default_factory=list)  # the outputs of its lines
    actors: int = 0

    def happens(self, method: str, *arguments: Any) -> Any:
        """Returns the answer of the actor's method, or raises its exception."""
        planned = {"start": self.checks, "make": self.lines}.get(method, [])
        found = planned.pop(0) if planned else None
        if isinstance(found, Exception):
            self.is_alive = not isinstance(found, ActorDiedError)
            raise found
        if method == "start":
            return self.name, found
        if method == "make":
            return found or self.make(*arguments)
        return ("high noise", 1, 2) if method == "state" else None

    def make(self, document: dict[str, Any], images: dict[str, bytes]) -> Delivered:
        config = Job.from_json(document).config
        self.made.append(Path(str(config.output.output)).stem)
        plan = Plan.of(config, model_files.locate_for(config.models).spec, (64, 48))
        seconds = {"encode": 0.0, "denoise": 1.0, "decode": 0.0}
        facts = {"compiled_anew": False, "cudnn_engines": None, "first_step_s": 1.0}
        made = sidecar.with_seconds(sidecar.planned(plan), facts, seconds)
        moved = config.video.with_images({"--image": "/there/image.png"})
        there = sidecar.moved(made, OutputConfig(output="/there/video.mp4"), moved)
        return Delivered(there, (b"mp4 " + images["--image"][:4],))


class Ray:
    """Stands in for Ray: the machines get actors in their order, and answer when they are waited for."""

    def __init__(self, *machines: Machine) -> None:
        self.machines = machines
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.killed: list[Machine] = []
        self.called: list[str] = []
        self.turns = itertools.count()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": machine.is_alive, "Resources": {"CPU": machine.cores}} for machine in self.machines]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: Any) -> Any:
        assert kind is cluster._Actor
        return self

    def options(self, *, max_concurrency: int, num_cpus: int) -> Any:
        def start(threads: str | None) -> Any:
            machine = min((each for each in self.machines if each.is_alive), key=lambda each: each.actors)
            machine.actors += 1
            return Actor(self, machine)

        return SimpleNamespace(remote=start)

    def wait(self, answers: list[Any], *, timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        if num_returns > 1:
            return answers, []
        chosen = answers[next(self.turns) % len(answers)]
        return [chosen], [answer for answer in answers if answer is not chosen]

    def get(self, answer: Callable[[], Any]) -> Any:
        return answer()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.machine)
        actor.machine.actors -= 1


@dataclass(eq=False)
class Actor:
    ray: Ray
    machine: Machine

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Callable[[], Any]:
            self.ray.called.append(method)
            return lambda: self.machine.happens(method, *arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def on(wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, Ray]]:
    """Returns `on(machines, lines)`, which makes a list on simulated machines."""

    def run(*machines: Machine, lines: int = 4, words: tuple[str, ...] = ()) -> tuple[Outcome, Ray]:
        (workdir / "jobs.jsonl").write_text("".join(f'{{"output": "{line}.mp4"}}\n' for line in range(lines)))
        ray = Ray(*machines)

        @contextmanager
        def connected(address: str) -> Iterator[Ray]:
            yield ray

        monkeypatch.setattr(cluster, "connected", connected)
        return wanfast("generate", *LIST, "--ray", "head:6379", *words, "--json"), ray

    return run


def lost(error: Exception | None = None) -> Delivered:
    return Delivered(failure(RankFailedError(str(error or "rank 0 was killed by SIGKILL"))), is_lost=True)


def test_lines_go_to_all_machines_and_the_files_to_the_caller(on: Any, workdir: Path) -> None:
    a, b = Machine("a"), Machine("b")
    outcome, ray = on(a, b)
    assert outcome.exit_code == 0, outcome.err
    assert sorted(a.made + b.made) == ["0", "1", "2", "3"] and a.made and b.made
    assert [Path(result["output"]).name for result in outcome.document["results"]] == [f"{k}.mp4" for k in range(4)]
    document = json.loads((workdir / "2.json").read_text())
    assert (workdir / "2.mp4").read_bytes() == b"mp4 \x89PNG"
    assert "/there" not in json.dumps(document)
    assert document["plan"]["outputs"] == [str(workdir / "2.mp4"), str(workdir / "2.json")]
    assert ray.killed == [a, b] and ray.called.count("close") == 2


def test_a_line_of_a_lost_machine_is_made_on_another(on: Any) -> None:
    a, b = Machine("a", lines=[ActorDiedError("gone")]), Machine("b")
    outcome, _ = on(a, b)
    assert outcome.exit_code == 0, outcome.err
    assert sorted(b.made) == ["0", "1", "2", "3"]
    assert (
        "note: --ray: a was lost; its line of --jobs waits for another machine, and gets at most 3 tries in all"
        in outcome.err
    )


def test_a_line_whose_ranks_die_is_tried_on_another_machine(on: Any) -> None:
    a, b = Machine("a", lines=[lost()]), Machine("b")
    outcome, _ = on(a, b)
    assert outcome.exit_code == 0, outcome.err
    assert "0" in b.made and "0" not in a.made


def test_a_line_that_kills_every_machine_fails_alone(on: Any) -> None:
    a = Machine("a", lines=[lost(), lost(), lost()])
    outcome, _ = on(a, lines=3)
    assert outcome.exit_code == 6
    assert [result.get("error") for result in outcome.document["results"]] == [
        "rank 0 was killed by SIGKILL", None, None
    ]  # fmt: skip
    assert "error: --jobs: 2 succeeded, 1 of 3 failed" in outcome.err


def test_a_machine_that_fails_again_and_again_gets_no_more_lines(on: Any) -> None:
    a, b = Machine("a", lines=[lost() for _ in range(9)]), Machine("b")
    outcome, _ = on(a, b, lines=6)
    assert outcome.exit_code == 0, outcome.err
    assert len(a.lines) == 7 and len(b.made) == 6
    assert "note: --ray: a gets no more lines of --jobs: rank 0 was killed by SIGKILL" in outcome.err


def test_a_line_that_is_wrong_is_not_tried_again(on: Any) -> None:
    a = Machine("a", lines=[Delivered(failure(ConfigError("--image: the file changed")))])
    outcome, _ = on(a, lines=2)
    assert outcome.exit_code == 6 and a.made == ["1"]


def test_a_machine_with_other_weights_makes_no_line(on: Any) -> None:
    a, b = Machine("a", checks=[failure(MissingArtifactError("x is missing: y"))]), Machine("b")
    outcome, _ = on(a, b)
    assert outcome.exit_code == 0, outcome.err
    assert a.made == [] and len(b.made) == 4 and a.actors == 0
    assert "note: --ray: a gets no line of --jobs: x is missing: y" in outcome.err


def test_without_a_machine_that_has_the_weights_each_line_has_the_error(on: Any) -> None:
    outcome, _ = on(Machine("a", checks=[failure(MissingArtifactError("x is missing: y"))]))
    assert outcome.exit_code == 6
    assert {(result["error"], result["exit_code"]) for result in outcome.document["results"]} == {
        ("x is missing: y", 3)
    }


LOST = "--ray: a was lost (ActorDiedError): run this command again with --skip-existing"


def test_when_the_last_machine_is_lost_the_lines_say_so(on: Any) -> None:
    outcome, _ = on(Machine("a", lines=[Delivered(failure(ConfigError("bad"))), ActorDiedError("gone")]), lines=3)
    errors = [result["error"] for result in outcome.document["results"]]
    assert outcome.exit_code == 6 and errors == ["bad", *[LOST] * 2]


def test_machines_that_cannot_start_are_tried_a_few_times(on: Any) -> None:
    broken = RayError("No module named 'wanfast'")
    outcome, ray = on(Machine("a", checks=[broken] * 9), lines=2)
    assert outcome.exit_code == 6 and ray.called.count("start") == cluster.MOST_TRIES
    message = "a machine could not start a rank group (No module named 'wanfast'): install the same wanfast"
    assert message in outcome.document["results"][1]["error"]


def test_a_bug_of_an_actor_keeps_its_traceback_and_ends_the_others(on: Any) -> None:
    machine = Machine("a", lines=[RayTaskError("our own bug")])
    with pytest.raises(RayTaskError, match="our own bug"):
        on(machine)
    assert machine.actors == 0


def test_a_file_that_cannot_be_written_costs_its_line(on: Any, workdir: Path) -> None:
    class Blocks(Machine):
        def make(self, document: dict[str, Any], images: dict[str, bytes]) -> Delivered:
            (workdir / "0.mp4").write_text("another program's")
            return super().make(document, images)

    outcome, _ = on(Blocks("a"), lines=2)
    assert outcome.exit_code == 6
    assert "another program wrote this file meanwhile" in outcome.document["results"][0]["error"]
    assert (workdir / "1.mp4").exists() and (workdir / "0.mp4").read_text() == "another program's"


def test_an_image_that_is_gone_costs_its_line(on: Any, workdir: Path) -> None:
    class Removes(Machine):
        def happens(self, method: str, *arguments: Any) -> Any:
            (workdir / "cat.png").unlink(missing_ok=True)
            return super().happens(method, *arguments)

    outcome, _ = on(Removes("a"), lines=1)
    assert outcome.exit_code == 6 and "--image" in outcome.document["results"][0]["error"]


def test_a_machine_without_enough_ranks_is_an_error_of_one_line(on: Any) -> None:
    outcome, _ = on(Machine("a", cores=1), Machine("b", cores=2), words=("--num-gpus", "4"))
    assert outcome.exit_code == 2
    assert "error: --num-gpus 4: no machine of --ray head:6379 has 4 CPU cores: use a smaller number" in outcome.err


def test_two_groups_fit_a_machine_with_twice_the_cores(on: Any) -> None:
    outcome, ray = on(Machine("a", cores=4), words=("--num-gpus", "2"))
    assert outcome.exit_code == 0 and ray.called.count("start") == 2
    assert outcome.document["results"][0]["plan"]["mesh"] == {"replica": 1, "cfg": 2, "ulysses": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*TINY, "--ray", "auto"), "--ray is for a list of videos: add --jobs, or drop --ray"),
        (
            (*LIST, "--ray", "auto", "--num-gpus", "2", "--cfg-parallel", "1", "--ulysses", "1"),
            "--num-gpus 2 gives 2 rank groups, but with --ray, --num-gpus is the number of ranks of one video: use "
            "--num-gpus 1",
        ),
        (
            (*LIST, "--ray", "auto", "--nnodes", "2", "--rdzv-endpoint", "a:1"),
            "--ray and --nnodes exclude each other: drop --nnodes to make each video on one machine, or drop --ray to "
            "make each video on several machines",
        ),
        ((*LIST, "--ray", "ray://head:10001"), "is neither HOST:PORT nor auto: give HOST:PORT of the cluster's head"),
    ],
    ids=["no list", "two groups", "nnodes", "client"],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    (workdir / "jobs.jsonl").write_text("{}\n")
    outcome = wanfast("generate", *words)
    assert outcome.exit_code == 2 and message in outcome.err and outcome.err.count("error:") == 1


def test_an_address_at_which_nothing_listens_is_refused_at_once(
    wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    (workdir / "jobs.jsonl").write_text("{}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    outcome = wanfast("generate", *LIST, "--ray", address)
    assert outcome.exit_code == 2
    assert f"error: --ray {address}: Connection refused: start a cluster by `ray start`" in outcome.err


def test_without_ray_the_extra_is_named(wanfast: Wanfast, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    (workdir / "jobs.jsonl").write_text("{}\n")
    outcome = wanfast("generate", *LIST, "--ray", "auto")
    assert outcome.exit_code == 2
    assert "error: --ray needs the package ray: run `pip install 'wanfast[ray]'`" in outcome.err


def test_a_dry_run_needs_no_cluster(wanfast: Wanfast, workdir: Path) -> None:
    (workdir / "jobs.jsonl").write_text("{}\n")
    assert wanfast("generate", *LIST, "--ray", "nowhere:1", "--dry-run").exit_code == 0


def test_what_rays_threads_print_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    with cluster._silent_threads():
        thread = threading.Thread(target=print, args=("the log of a dead machine",), name="ray_listen_error_messages")
        thread.start()
        thread.join()
        print("our own")
    assert capsys.readouterr().out == "our own\n"


def test_the_exit_code_of_a_signal_stays_although_ray_forgets_it() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, cluster._own_sigterm() as restore:
        restore()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit:
            sys.exit(1)  # as `ray.wait` does
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler


# On simulated machines


@dataclass
class Command:
    """Holds a command that runs in the namespace of the nodes."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, on: Nodes, folder: Path, *words: str) -> Command:
        command = on.inside(sys.executable, "-m", "wanfast", "generate", *words, "--ray", on.address)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return cls(process)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out, err


@pytest.fixture
def isolated() -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`, which `make test-long` installs")
    if not can_isolate():
        pytest.skip("needs `unshare -rn` and `ip`: a network namespace of its own")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_list_of_thirty_outlives_one_of_three_machines(isolated: None, workdir: Path, wanfast: Wanfast) -> None:
    (workdir / "jobs.jsonl").write_text(
        "".join(json.dumps({"output": f"{line}.mp4", "seed": line}) + "\n" for line in range(30))
    )
    with nodes(1, 1, 1) as machines:
        command = Command.start(machines, workdir, *LIST)
        assert command.process.stdout
        for _ in range(10):
            assert command.process.stdout.readline()
        machines.kill(2)
        code, _, err = command.end()
        assert code == 0, err
        assert "was lost" in err and not machines.ranks()
    assert all((workdir / f"{line}.mp4").exists() and (workdir / f"{line}.json").exists() for line in range(30))
    assert [path for path in workdir.iterdir() if path.name.startswith(".")] == []
    videos = [(workdir / f"{line}.mp4").read_bytes() for line in range(30)]
    assert wanfast("generate", *LIST, "--overwrite").exit_code == 0  # without Ray
    assert videos == [(workdir / f"{line}.mp4").read_bytes() for line in range(30)]


@pytest.mark.long
@pytest.mark.timeout(200)
def test_videos_of_several_clips_are_made_on_a_cluster(isolated: None, workdir: Path, wanfast: Wanfast) -> None:
    """Each one has as many clips as without Ray, and the same bytes."""
    write_video(workdir / "old.mp4", 64, 48)
    lines: list[dict[str, Any]] = [
        {"output": "two.mp4", "prompt": ["a cat", "a dog"], "seed": 1},
        {"output": "more.mp4", "prompt": ["a cat", "a dog", "a bird"], "continue_from": "old.mp4", "seed": 2},
        {"output": "one.mp4", "seed": 3},
    ]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with nodes(1, 1) as machines:
        code, _, err = Command.start(machines, workdir, *LIST).end()
        assert code == 0, err
    files = [workdir / line["output"] for line in lines]
    assert [len([*earlier_frames(str(file))]) for file in files] == [9, 3 + 3 * 4, 5]
    assert [json.loads(file.with_suffix(".json").read_text())["plan"]["clips"] for file in files] == [2, 3, 1]
    videos = [file.read_bytes() for file in files]
    assert wanfast("generate", *LIST, "--overwrite").exit_code == 0  # without Ray
    assert videos == [file.read_bytes() for file in files]


@pytest.mark.long
@pytest.mark.timeout(200)
def test_ctrl_c_and_sigterm_end_the_ranks_on_all_machines(isolated: None, workdir: Path) -> None:
    (workdir / "jobs.jsonl").write_text("{}\n{}\n{}\n")
    with nodes(1, 1) as machines:
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            command = Command.start(machines, workdir, *LIST, "--steps", "1000")
            while not any('"high noise"' in file.read_text() for file in workdir.glob("artifacts/runs/*/progress/*")):
                assert command.process.poll() is None, command.end()
                time.sleep(0.1)
            command.process.send_signal(number)
            code, _, err = command.end()
            assert code == expected and "no half-written file is left" in err
            assert not machines.ranks()
            assert {path.name for path in workdir.iterdir()} == {"artifacts", "cat.png", "jobs.jsonl"}
            for file in workdir.glob("artifacts/runs/*/progress/*"):
                file.unlink()
