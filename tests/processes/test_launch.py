"""Tests `wanfast generate` on several ranks, as whole processes over gloo: its results, and how it ends on failure."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import psutil
import pytest

from tests.clean import CleanPopen
from tests.configs import effective_config
from tests.conftest import Outcome
from wanfast.runtime.config import RanksConfig
from wanfast.runtime.processes import elastic, failures, launch
from wanfast.runtime.processes.claims import claim

PACKAGE = Path(__file__).parents[2]
TINY = ("--model", "tiny", "--image", "cat.png", "--prompt", "a cat", "--device", "cpu", "--precision", "fp32")
SMALL = (*TINY, "--seed", "1", "--size", "64x64", "--frames", "5")
ENDLESS = (*SMALL, "--steps", "1000")  # no test waits for its end

Start = Callable[..., "Run"]


class Run:
    """Holds a started command line and what is observed of it from outside.

    `forked`: none of its processes imports torch again.
    """

    def __init__(
        self, folder: Path, *arguments: str, environment: dict[str, str] | None = None, forked: bool = True
    ) -> None:
        self.folder = folder
        path = os.pathsep.join([*filter(None, [(environment or {}).get("PYTHONPATH")]), str(PACKAGE)])
        popen = CleanPopen if forked else subprocess.Popen
        self.process = popen(
            [sys.executable, "-m", "wanfast", "generate", *arguments],
            cwd=folder,
            env=os.environ | (environment or {}) | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Returns (exit code, stdout, stderr)."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def children(self) -> list[psutil.Process]:
        """Returns the launchers and the ranks."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_steps(self, done: int = 1, replica: int = 0) -> dict[int, int]:
        """Waits until a rank group is denoising; returns {rank: its process id}."""
        runs = self.folder / "artifacts/runs"
        for _ in range(3000):
            time.sleep(0.02)
            assert self.process.poll() is None, self.end()
            for file in runs.glob(f"*/progress/{replica}.json"):
                files = (file.parents[1] / "ranks").glob(f"{replica}-*/pid")
                ranks = {int(pid.parent.name.split("-")[1]): int(pid.read_text()) for pid in files}
                has_begun = json.loads(file.read_text())["done"] >= done
                if has_begun and {child.pid for child in self.children()} >= set(ranks.values()):
                    return ranks
        raise AssertionError("no step in a minute")

    def wait_for_launcher(self) -> None:
        while not self.children():
            time.sleep(0.02)


@pytest.fixture
def start(workdir: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(*arguments: str, **options: Any) -> Run:
        runs.append(Run(options.pop("folder", workdir), *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            for child in run.children():
                child.kill()
            run.process.kill()
            run.process.communicate()


def gone(processes: list[psutil.Process], within_s: float) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def only_inputs(folder: Path) -> bool:
    """Returns whether the folder holds no video, whole or partial."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("artifacts", "faults")) == ["cat.png"]


def with_fault(folder: Path, code: str, *, rank: int, replica: int | None = 0) -> dict[str, str]:
    """Returns an environment in which a rank of one group, or of all if `replica` is None, runs `code` first."""
    (folder / "faults").mkdir()
    (folder / "faults/sitecustomize.py").write_text(f"""
import os
from wanfast.runtime.processes import worker
main = worker.main
def faulty(run_folder, number):
    if os.environ["RANK"] == "{rank}" and {replica} in (None, number):
        exec({code!r}, {{"os": os}})
    main(run_folder, number)
worker.main = faulty
""")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder / "faults"), os.environ.get("PYTHONPATH"))))}


def in_third_step(fault: str) -> str:
    return f"""
from wanfast.runtime.sampling.scheduler import Integrator
advance, calls = Integrator.advance, []
def faulty(self, *arguments):
    calls.append(1)
    if len(calls) == 3:
        {fault}
    return advance(self, *arguments)
Integrator.advance = faulty
"""


def test_two_ranks_make_the_video_of_one(start: Start, workdir: Path) -> None:
    for name, ranks in (("one", []), ("two", ["--num-gpus", "2"])):
        video = (*SMALL, "--steps", "4", "--output", f"{name}.mp4", "--json", *ranks)
        code, out, err = start(*video, forked=name == "one").end()
        assert code == 0, err
        document = json.loads(out.strip().splitlines()[-1])
        assert document == json.loads((workdir / f"{name}.json").read_text())
    one, two = (iio.imread(f"{name}.mp4", plugin="pyav").astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 2
    assert document["plan"]["mesh"] == {"replica": 1, "cfg": 2, "ulysses": 1}
    assert len(document["peak_memory_bytes_by_rank"]) == 2
    assert document["peak_memory_bytes"] == max(document["peak_memory_bytes_by_rank"])
    assert set(document["loading"]) == {"high_noise", "low_noise", "vae"}  # the prompts' embeddings were stored by then
    assert set(json.loads((workdir / "one.json").read_text())["loading"]) - set(document["loading"]) == {"umt5"}
    (run,) = (path.parent for path in workdir.glob("artifacts/runs/*/ranks"))
    assert len(list(run.glob("logs/*/attempt_0/*/stderr.log"))) == 2
    assert start("--from", "two.json", "--output", "again.mp4").end()[0] == 0  # by two ranks again
    assert (workdir / "again.mp4").read_bytes() == (workdir / "two.mp4").read_bytes()
    assert json.loads((run / "result.json").read_text()) == [document]


def test_a_killed_rank_ends_the_run_and_is_named(start: Start, workdir: Path) -> None:
    run = start(*ENDLESS, "--num-gpus", "4")
    pids, children = run.wait_for_steps(), run.children()
    assert sorted(pids) == [0, 1, 2, 3]
    killed = time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    code, _, err = run.end(30)
    assert (code, time.monotonic() - killed < 30) == (5, True)
    assert "error: rank 2 was killed by SIGKILL; logs" in err, err
    assert len(err.strip().splitlines()[-1]) < 400
    assert gone(children, 5) and only_inputs(workdir)


def test_a_rank_that_raises_is_named_not_its_peers(start: Start, workdir: Path) -> None:
    fault = in_third_step("raise ValueError('boom')")
    run = start(*ENDLESS, "--num-gpus", "4", environment=with_fault(workdir, fault, rank=1))
    code, _, err = run.end(60)
    assert code == 5 and "error: rank 1 failed: ValueError: boom; logs" in err, err
    assert only_inputs(workdir)
    log = next(workdir.glob("artifacts/runs/*/logs/*/attempt_0/1/stderr.log"))
    assert "Traceback" in log.read_text()


ENDS = {
    "ABRT": ("os.abort()", "was killed by SIGABRT"),
    "_exit": ("os._exit(3)", "ended with exit code 3"),
    "exit": ("sys.exit(3)", "failed: SystemExit: 3"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_rank_that_ends_in_the_middle_is_named_not_its_peers(start: Start, workdir: Path, end: str) -> None:
    fault, said = ENDS[end]
    environment = with_fault(workdir, in_third_step(f"import os, sys; {fault}"), rank=1)
    code, _, err = start(*ENDLESS, "--num-gpus", "2", environment=environment).end()
    assert code == 5 and f"error: rank 1 {said}; logs" in err, err
    assert only_inputs(workdir)


def test_a_rank_that_hangs_is_named(start: Start, workdir: Path) -> None:
    environment = with_fault(workdir, in_third_step("import time; time.sleep(1000)"), rank=1)
    run = start(*ENDLESS, "--num-gpus", "4", "--rank-timeout", "3", environment=environment)
    run.wait_for_steps(done=2)
    began, children = time.monotonic(), run.children()
    code, _, err = run.end(60)
    assert code == 5 and "the ranks waited --rank-timeout 3 s for rank 1, which hangs" in err, err
    assert time.monotonic() - began < 30
    assert gone(children, 5) and only_inputs(workdir)
    left = workdir.glob("artifacts/runs/*/ranks/*/progress")
    done = {file.parent.name: json.loads(file.read_text())["done"] for file in left}
    assert done == {f"0-{rank}": 2 if rank == 1 else 3 for rank in range(4)}


def test_a_rank_that_hangs_without_peers_costs_its_video(start: Start, workdir: Path) -> None:
    """Two groups of one rank, which exchange nothing."""
    (workdir / "jobs.jsonl").write_text(
        "".join(json.dumps({"output": f"{k}.mp4", "steps": 4}) + "\n" for k in range(3))
    )
    environment = with_fault(workdir, in_third_step("import time; time.sleep(1000)"), rank=0)
    ranks = ("--num-gpus", "2", "--cfg-parallel", "1", "--ulysses", "1", "--rank-timeout", "1")
    code, out, err = start(*SMALL, *ranks, "--jobs", "jobs.jsonl", "--json", environment=environment).end()
    assert code == 6, err
    (error,) = (result for result in json.loads(out.strip().splitlines()[-1])["results"] if "error" in result)
    assert error["exit_code"] == 5 and "rank 0 hangs: step 3 of 4 (low noise)" in error["error"]
    assert "--rank-timeout 1 s" in error["error"] and len(list(workdir.glob("*.mp4"))) == 2


def test_a_users_error_of_a_rank_keeps_its_code(start: Start, workdir: Path) -> None:
    fault = "from wanfast.runtime.errors import ConfigError; raise ConfigError('--size: too large')"
    run = start(*ENDLESS, "--num-gpus", "2", environment=with_fault(workdir, in_third_step(fault), rank=1))
    code, _, err = run.end()
    assert code == 2 and "error: --size: too large" in err


def test_a_rank_that_is_killed_while_it_writes_leaves_no_half_of_a_file(start: Start, workdir: Path) -> None:
    fault = """
import signal
from pathlib import Path
from wanfast.runtime.media import video_file
class Killed(video_file.Mp4Writer):
    def add(self, frames):
        self._path.write_bytes(b"half")
        Path("written").touch()
        os.kill(os.getpid(), signal.SIGKILL)
video_file.Mp4Writer = Killed
"""
    run = start(*SMALL, "--steps", "1", "--num-gpus", "2", environment=with_fault(workdir, fault, rank=0))
    code, _, err = run.end()
    assert code == 5 and "rank 0 was killed by SIGKILL" in err
    (workdir / "written").unlink()
    assert only_inputs(workdir)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_groups_of_a_command_end_without_being_asked(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """No batch follows, so that a GPU is already free while the command prints the result.

    Each group is formed without the random delay by which torch lets many machines not meet all at once.
    """
    monkeypatch.setattr(random, "uniform", lambda *_: pytest.fail("torch's agent delays the start of a group"))
    close, codes = launch.RankGroups.close, []

    def noted(self: launch.RankGroups) -> None:
        codes.extend(launcher.wait(20) for launcher in self._launchers.values())
        close(self)

    monkeypatch.setattr(launch.RankGroups, "close", noted)
    lines = [json.dumps({"output": f"{number}.mp4", "steps": 1}) for number in range(jobs)]
    (workdir / "jobs.jsonl").write_text("\n".join(lines))
    outcome = wanfast("generate", *SMALL, "--num-gpus", "2", "--jobs", "jobs.jsonl", "--ulysses", "1")
    assert outcome.exit_code == 0, outcome.err
    assert codes == [0] * len(codes) and codes


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_signals_end_every_rank(start: Start, workdir: Path, number: signal.Signals, expected: int) -> None:
    run = start(*ENDLESS, "--num-gpus", "2", forked=number == signal.SIGTERM)
    run.wait_for_steps()
    children = run.children()
    if number == signal.SIGINT:  # of a fork, the environment cannot be read
        (launcher,) = (child for child in children if child.ppid() == run.process.pid)
        assert launcher.environ()["WANFAST_PARENT"] == str(run.process.pid)
    sent = time.monotonic()
    run.process.send_signal(number)
    code, _, err = run.end(10)
    assert code == expected and time.monotonic() - sent < launch._GRACE_S, err  # no process had to be killed
    assert gone(children, 1) and only_inputs(workdir)
    assert "Traceback" not in next(workdir.glob("artifacts/runs/*/logs/launcher-0.log")).read_text()


def test_ranks_die_with_a_parent_that_is_killed(start: Start) -> None:
    run = start(*ENDLESS, "--num-gpus", "2")
    run.wait_for_steps()
    children = run.children()
    run.process.kill()
    assert len(children) == 3 and gone(children, 10)


def test_ranks_die_with_a_launcher_that_is_killed(start: Start, workdir: Path) -> None:
    run = start(*ENDLESS, "--num-gpus", "2")
    rank, children = run.wait_for_steps()[0], run.children()
    psutil.Process(rank).parent().kill()
    code, _, err = run.end(20)
    assert code == 5 and "the launcher of rank group 0 failed" in err
    assert gone(children, 5) and only_inputs(workdir)


@pytest.mark.parametrize(("parent", "alive"), [(os.getpid(), True), (1, False)], ids=["there", "gone"])
def test_a_process_whose_parent_is_gone_ends_at_once(parent: int, alive: bool) -> None:
    code = "from wanfast.runtime.machine.signals import end_with_parent; end_with_parent(); print('alive')"
    own = str(os.getpid()) if alive else str(parent)
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "WANFAST_PARENT": own}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ("alive" in done.stdout, "is gone" in done.stderr) == (alive, not alive)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_process_ends_on_a_signal_that_its_parent_ignores(number: signal.Signals) -> None:
    code = "import os; from wanfast.runtime.machine.signals import end_with_parent as end; end(); os.kill(os.getpid(), "
    ignoring = ["sh", "-c", "trap '' INT TERM; exec \"$@\"", "sh"]
    program = [*ignoring, sys.executable, "-c", f"{code}{number:d})"]
    assert subprocess.run(program, env=os.environ | {"PYTHONPATH": str(PACKAGE)}).returncode == -number


def test_a_launcher_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deaf").write_text("#!/bin/sh\ntrap '' TERM\necho deaf\nexec sleep 100\n")
    (tmp_path / "deaf").chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "deaf"))
    monkeypatch.setattr(launch, "_GRACE_S", 0.1)
    with launch.RankGroups(tmp_path, effective_config(num_gpus=2).ranks, 1) as ranks:
        launcher = ranks._launchers[0]
        while not (tmp_path / "logs/launcher-0.log").read_text():
            time.sleep(0.01)
    assert launcher.returncode == -signal.SIGKILL


def test_a_rank_that_dies_as_it_is_stopped_died_on_its_own() -> None:
    """A killed rank closes its connections first, so that the agent may stop it for a peer's failure."""
    term, kill = signal.SIGTERM, signal.SIGKILL
    cases = [(-term, [term], True), (-kill, [term, kill], True), (-kill, [term], False), (3, [term], False)]
    cases += [(-kill, [], False)]
    for code, sent, expected in cases:
        child = SimpleNamespace(pid=7, exitcode=code)
        assert elastic._was_stopped(child, {7: sent} if sent else {}) == expected, (code, sent)


class Ended:
    """A launcher that has ended."""

    returncode = 0

    def poll(self) -> int:
        return 0

    def wait(self, timeout: float | None = None) -> int:
        return 0


@pytest.fixture
def ended_launchers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(number of the group, its first batch) of each launcher that is started."""
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(launch, "_start", lambda folder, number, batch: started.append((number, batch)) or Ended())
    return started


IGNORED = {"on_result": lambda *result: None, "on_progress": lambda *state: None}


def test_results_that_come_with_the_launchers_end_are_told(
    tmp_path: Path, ended_launchers: list[tuple[int, int]]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/0.json").write_text('{"output": "out.mp4"}')
    told: list[tuple[int, object]] = []
    with launch.RankGroups(tmp_path, effective_config(num_gpus=2).ranks, 1) as ranks:
        ranks.run("w", [{}], [], on_result=lambda *result: told.append(result), on_progress=lambda *state: None)
    assert told == [(0, {"output": "out.mp4"})]


def test_no_rank_group_lacks_a_job() -> None:
    config = effective_config(num_gpus=8, cfg_parallel=2).ranks
    assert [launch.num_groups(config, jobs) for jobs in (1, 3, 9)] == [1, 3, 4]
    assert launch.num_groups(effective_config(num_gpus=1, ulysses=2).ranks, 3) == 1  # a group of two machines


def test_groups_that_died_are_started_again_for_the_next_batch(
    tmp_path: Path, ended_launchers: list[tuple[int, int]]
) -> None:
    """Under numbers of their own, so that what the dead ones left is not taken for theirs, but in the same place."""
    with launch.RankGroups(tmp_path, effective_config(num_gpus=2).ranks, 2) as ranks:
        for _ in range(2):
            (result,) = ranks.run("w", [{}], [], **IGNORED)
            assert result["exit_code"] == 5
    each_twice = [(2, 0), (3, 0), (4, 0), (5, 0)], [(6, 1), (7, 1), (8, 1), (9, 1)]  # no group claimed a job
    assert ended_launchers == [(0, 0), (1, 0), *each_twice[0], *each_twice[1]]
    assert [json.loads((tmp_path / name).read_text())["first"] for name in ("job.json", "job-0001.json")] == [0, 1]


def test_ranks_are_waited_for_before_their_files_are_removed(
    tmp_path: Path, ended_launchers: list[tuple[int, int]]
) -> None:
    with launch.RankGroups(tmp_path, effective_config(num_gpus=2).ranks, 1) as ranks:
        rank = subprocess.Popen(["sh", "-c", "sleep 0.2; touch .out.mp4.$$.part"], cwd=tmp_path)
        threading.Thread(target=rank.wait).start()
        (tmp_path / "ranks/1-0").mkdir(parents=True)
        (tmp_path / "ranks/1-0/pid").write_text(str(rank.pid))
        ranks.run("w", [{}], [tmp_path / "out.mp4"], **IGNORED)
        assert not psutil.pid_exists(rank.pid) and not list(tmp_path.glob(".out.mp4.*"))


class Living(Ended):
    """A launcher that has not ended."""

    pid = 0

    def __init__(self) -> None:
        self.signals: list[str] = []

    def poll(self) -> int | None:  # type: ignore[override]
        return 0 if self.signals else None

    def terminate(self) -> None:
        self.signals.append("terminate")


@pytest.fixture
def living_launchers(monkeypatch: pytest.MonkeyPatch) -> list[Living]:
    started: list[Living] = []
    monkeypatch.setattr(launch, "_start", lambda *arguments: started.append(Living()) or started[-1])
    monkeypatch.setattr(launch, "_GRACE_S", 0.1)
    return started


def start_numbered(monkeypatch: pytest.MonkeyPatch, on_second: Callable[[], None]) -> list[Living]:
    """Returns the launchers that will be started; calls `on_second` when the second one starts."""
    started: list[Living] = []

    def begin(folder: Path, number: int, batch: int) -> Living:
        started.append(Living())
        if number == 1:
            on_second()
        return started[-1]

    monkeypatch.setattr(launch, "_start", begin)
    monkeypatch.setattr(launch, "_GRACE_S", 0.1)
    return started


def test_a_group_that_dies_before_its_first_job_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start_numbered(monkeypatch, lambda: with_result(tmp_path, 0))

    def dies() -> bool:
        started[0].signals.append("died")
        return False

    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        assert ranks.run("w", [{}], [], **IGNORED, cancelled=dies) == [{}]
    assert len(started) == 2


def test_a_job_that_a_rank_claims_after_its_group_was_started_again_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank lives a little longer than its launcher that was killed."""
    started = start_numbered(monkeypatch, lambda: claim(tmp_path, 1, 0))
    ends = time.monotonic() + 3

    def dies() -> bool:
        claim(tmp_path, 0, 0)
        started[0].signals.append("died")
        if time.monotonic() > ends:
            pytest.fail("the job belongs to no living group, and nobody noticed")
        return False

    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        results = ranks.run("w", [{}, {}], [], **IGNORED, cancelled=dies)
    assert [result["exit_code"] for result in results] == [5, 5] and len(started) == 2


def with_result(folder: Path, index: int) -> None:
    for name in (f"results/{index}.json", f"frames/{index}.npy"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    claim(folder, index, 0)


def test_a_long_run_keeps_only_the_files_of_its_last_batch(tmp_path: Path, living_launchers: list[Living]) -> None:
    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        for number in range(4):
            with_result(tmp_path, number)
            ranks.run("w", [{}], [], **IGNORED)
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {"setup.json", "job-0003.json", "results/3.json", "claims/3", "frames/3.npy"}


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_stores_no_texts_keeps_no_batch(
    tmp_path: Path, living_launchers: list[Living], error: type[BaseException] | None
) -> None:
    def ends(*result: object) -> None:
        if error is not None:
            raise error

    with launch.RankGroups(tmp_path, effective_config().ranks, 1, stores_texts=False) as ranks:
        with_result(tmp_path, 0)
        with pytest.raises(error) if error else nullcontext():
            ranks.run("w", [{}], [], on_result=ends, on_progress=lambda *state: None)
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {"setup.json"} and json.loads((tmp_path / "setup.json").read_text())["stores_texts"] is False


@pytest.mark.parametrize(("error", "ends"), [(ZeroDivisionError, False), (KeyboardInterrupt, True)])
def test_an_exception_of_a_callback_cancels_and_an_interrupt_stops(
    tmp_path: Path, living_launchers: list[Living], error: type[BaseException], ends: bool
) -> None:
    def fails(*state: object) -> None:
        with_result(tmp_path, 0)  # as the ranks do when they are cancelled
        raise error

    (tmp_path / "progress").mkdir()
    (tmp_path / "progress/0.json").write_text(json.dumps({"job": 0, "stage": "a", "done": 0, "total": 2}))
    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        with pytest.raises(error):
            ranks.run("w", [{}], [], on_result=lambda *result: None, on_progress=fails)
        assert (tmp_path / "cancel/0").exists() != ends
        assert bool(living_launchers[0].signals) == ends
        with_result(tmp_path, 1)
        assert ranks.run("w", [{}], [], **IGNORED) == [{}]
        assert len(living_launchers) == (2 if ends else 1)


def test_a_rank_that_died_between_two_batches_is_noticed(tmp_path: Path, living_launchers: list[Living]) -> None:
    rank = subprocess.Popen(["true"])  # not waited for: a zombie, as below a launcher that has not noticed
    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        (tmp_path / "ranks/0-0").mkdir(parents=True)
        (tmp_path / "ranks/0-0/pid").write_text(str(rank.pid))
        while psutil.Process(rank.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with_result(tmp_path, 0)
        assert ranks.run("w", [{}], [], **IGNORED) == [{}]
    rank.wait()
    assert len(living_launchers) == 2 and living_launchers[0].signals == ["terminate"]


def test_a_start_that_fails_can_be_tried_again(
    tmp_path: Path, living_launchers: list[Living], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError("no process is left")

    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        ranks.stop()
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_start", fails)
            with pytest.raises(OSError, match="no process"):
                ranks.run("w", [{}], [], **IGNORED)
        with_result(tmp_path, 0)
        assert ranks.run("w", [{}], [], **IGNORED) == [{}] and ranks._numbers == {0: 1}


def test_the_lines_that_no_group_can_be_started_for_have_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line is made, the second kills its group, and then the machine has no process left."""
    started = [Living()]
    launchers = iter(started)

    def popen(*arguments: object, **named: object) -> Living:
        if launcher := next(launchers, None):
            return launcher
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def dies() -> bool:
        with_result(tmp_path, 0)
        claim(tmp_path, 1, 0)
        started[0].signals.append("died")
        return False

    monkeypatch.setattr(subprocess, "Popen", popen)
    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        made, killed, left = ranks.run("w", [{}, {}, {}], [], **IGNORED, cancelled=dies)
    assert made == {} and "the launcher of rank group 0 failed" in killed["error"]
    reason = "the ranks of group 1 cannot be started (Resource temporarily unavailable): end other programs"
    assert left["error"].startswith(reason) and left["exit_code"] == 2 and reason in capsys.readouterr().err


def test_the_half_of_a_frames_file_of_a_dead_rank_is_removed(
    tmp_path: Path, ended_launchers: list[tuple[int, int]]
) -> None:
    with launch.RankGroups(tmp_path, effective_config().ranks, 1) as ranks:
        for name in ("ranks/1-0", "frames"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "ranks/1-0/pid").write_text("123456789")
        (tmp_path / "frames/.0.npy.123456789.part").write_text("half")
        ranks.run("w", [{}], [], **IGNORED)
    assert not list((tmp_path / "frames").iterdir())


def test_the_first_rank_that_ends_without_a_word_is_the_cause() -> None:
    def ended(codes: dict[str, int], stopped: str = "", seconds: int = 100, told: str = "") -> tuple[str, int] | None:
        known = {"exit_codes": codes, "seconds": dict.fromkeys(codes, seconds), "stopped": list(stopped)}
        return failures._ended(known, [{"rank": int(rank), "time": 100 * 10**9} for rank in told])

    for code in (-signal.SIGTERM, -signal.SIGABRT, -signal.SIGKILL, 3):
        assert ended({"1": code}) == ended({"0": 1, "1": code}, told="0") == ("1", code)
        assert ended({"0": 1, "1": code}, told="0", seconds=110) is None  # it outlived rank 0's error
        assert ended({"1": code, "0": -signal.SIGTERM}, stopped="0") == ("1", code)
    assert ended({"0": 1, "1": -signal.SIGTERM}, told="0", stopped="1") is None
    assert ended({"0": 1, "1": 3}, told="0") == ("1", 3)
    assert ended({}) is None


@pytest.mark.parametrize(
    ("idle_s", "said"),
    [(5, "waited --rank-timeout 5 s for rank 1, which hangs"), (1, "rank 0 was killed by SIGABRT")],
    ids=["the watchdog", "itself"],
)
def test_ranks_that_are_aborted_waited_only_if_that_long_passed(tmp_path: Path, idle_s: int, said: str) -> None:
    for rank, done in ((0, 3), (1, 2)):
        own = tmp_path / f"ranks/0-{rank}"
        own.mkdir(parents=True)
        for name, text in (("pid", "1"), ("progress", json.dumps({"job": 0, "stage": "a", "done": done}))):
            (own / name).write_text(text)
            os.utime(own / name, (100 - idle_s, 100 - idle_s))
    known = {"exit_codes": {"0": -signal.SIGABRT}, "seconds": {"0": 100}, "stopped": []}
    (tmp_path / "ranks/0.json").write_text(json.dumps(known))
    _, error = failures.error_of_group(tmp_path, 0, SimpleNamespace(rank_timeout=5.0))
    assert said in str(error)


def test_a_rank_group_that_dies_leaves_the_others_at_work(start: Start, workdir: Path) -> None:
    """Two rank groups of two ranks share three jobs; the killed group loses only its current video."""
    lines = [{"steps": 1000, "output": "lost.mp4"}, {"steps": 3, "output": "a.mp4"}, {"steps": 3, "output": "b.mp4"}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = start(*SMALL, "--jobs", "jobs.jsonl", "--num-gpus", "4", "--cfg-parallel", "1", "--json")
    for _ in range(3000):  # find the rank group that took the first line
        time.sleep(0.02)
        at_work = {file.stem: json.loads(file.read_text()) for file in workdir.glob("artifacts/runs/*/progress/*.json")}
        if lost := [replica for replica, state in at_work.items() if state["job"] == 0 and state["done"] > 0]:
            break
    os.kill(run.wait_for_steps(replica=int(lost[0]))[1], signal.SIGKILL)
    code, out, err = run.end()
    assert code == 6, err
    results = json.loads(out.strip().splitlines()[-1])["results"]
    assert [result.get("exit_code") for result in results] == [5, None, None]
    assert "error (line 1): rank 1 was killed by SIGKILL" in err
    assert (workdir / "a.mp4").exists() and (workdir / "b.mp4").exists() and not (workdir / "lost.mp4").exists()


def test_a_rank_group_outlives_an_error_that_all_its_ranks_know_of(start: Start, workdir: Path) -> None:
    fault = """
from wanfast.runtime.media import video_file
from wanfast.runtime.errors import ConfigError
class Full(video_file.Mp4Writer):
    def add(self, frames):
        if "full" in self._path.name:
            raise ConfigError("--output: no space left")
        super().add(frames)
video_file.Mp4Writer = Full
"""
    lines = [{"output": "full.mp4", "steps": 1}, {"output": "good.mp4", "steps": 1}]
    (workdir / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    environment = with_fault(workdir, fault, rank=0)
    code, out, _ = start(*SMALL, "--num-gpus", "2", "--jobs", "jobs.jsonl", "--json", environment=environment).end()
    results = json.loads(out.strip().splitlines()[-1])["results"]
    assert code == 6 and results[0]["error"] == "--output: no space left" and "error" not in results[1]


def test_a_rank_group_that_cannot_load_leaves_the_list_to_the_others(start: Start, workdir: Path) -> None:
    fault = """
import torch
from wanfast.runtime.engine import session
def too_large(*arguments):
    raise torch.OutOfMemoryError
session.load_models = too_large
"""
    (workdir / "jobs.jsonl").write_text("\n".join(json.dumps({"output": f"{k}.mp4", "steps": 2}) for k in range(4)))
    environment = with_fault(workdir, fault, rank=0, replica=1)
    ranks = ("--num-gpus", "2", "--cfg-parallel", "1", "--ulysses", "1")
    code, out, _ = start(*SMALL, *ranks, "--jobs", "jobs.jsonl", "--json", environment=environment).end()
    results = json.loads(out.strip().splitlines()[-1])["results"]
    assert code == 6 and sorted("error" in result for result in results) == [False, False, False, True]
    (error,) = (result for result in results if "error" in result)
    assert error["exit_code"] == 2 and "a rank ran out of memory" in error["error"]


def test_two_runs_in_one_folder_do_not_touch_each_other(start: Start, workdir: Path) -> None:
    doomed = start(*ENDLESS, "--num-gpus", "2", "--output", "doomed.mp4")
    doomed.wait_for_steps()
    other = start(*SMALL, "--steps", "20", "--num-gpus", "2", "--output", "other.mp4")
    other.wait_for_steps()
    doomed.process.send_signal(signal.SIGINT)
    assert doomed.end(10)[0] == 130
    code, _, err = other.end()
    assert code == 0, err
    assert (workdir / "other.mp4").exists() and not list(workdir.glob("*doomed*"))


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_two_machines_make_one_video(start: Start, workdir: Path) -> None:
    """Each machine has its own disk. The first machine leads, although the second one started earlier."""
    machines = [workdir / name for name in ("first", "second")]
    for machine in machines:
        machine.mkdir()
        (machine / "cat.png").write_bytes((workdir / "cat.png").read_bytes())
    video = (*TINY, "--size", "64x64", "--frames", "5", "--steps", "4", "--json")
    nodes = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    second = start(*video, *nodes, "--node-rank", "1", folder=machines[1])
    second.wait_for_launcher()
    first = start(*video, *nodes, "--node-rank", "0", folder=machines[0])
    (code, out, err), (code2, out2, err2) = first.end(), second.end()
    assert (code, code2) == (0, 0), err + err2
    documents = [json.loads(text.strip().splitlines()[-1]) for text in (out, out2)]
    assert documents[0] == documents[1]  # including the drawn seed
    assert documents[0]["plan"]["mesh"] == {"replica": 1, "cfg": 2, "ulysses": 1}
    assert documents[0]["effective"]["ranks"]["node_rank"] == 0
    assert [(machine / "out.mp4").exists() for machine in machines] == [True, False]
    assert start("--from", "out.json", "--output", "alone.mp4", folder=machines[0]).end()[0] == 0  # by one rank
    two, one = (iio.imread(machines[0] / name, plugin="pyav").astype(int) for name in ("out.mp4", "alone.mp4"))
    assert np.abs(one - two).max() <= 2


def test_two_machines_make_each_video_of_a_list_together(start: Start, workdir: Path) -> None:
    machines = [workdir / name for name in ("first", "second")]
    for machine in machines:
        machine.mkdir()
        (machine / "cat.png").write_bytes((workdir / "cat.png").read_bytes())
        (machine / "jobs.jsonl").write_text("\n".join(json.dumps({"output": f"{k}.mp4", "steps": 1}) for k in range(2)))
    nodes = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--jobs", "jobs.jsonl", "--json")
    runs = [start(*SMALL, *nodes, "--node-rank", str(rank), folder=machines[rank]) for rank in (0, 1)]
    ended = [run.end() for run in runs]
    assert [code for code, _, _ in ended] == [0, 0], ended
    results = [json.loads(out.strip().splitlines()[-1])["results"] for _, out, _ in ended]
    assert {json.dumps(result["plan"]["mesh"]) for each in results for result in each} == {
        json.dumps({"replica": 1, "cfg": 2, "ulysses": 1})
    }
    assert [sorted(path.name for path in machine.glob("*.mp4")) for machine in machines] == [["0.mp4", "1.mp4"], []]


def test_a_port_in_use_is_said(start: Start) -> None:
    with socket.create_server(("", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        code, _, err = start(*SMALL, "--nnodes", "2", "--rdzv-endpoint", endpoint).end(20)
    assert code == 2 and f"--rdzv-endpoint {endpoint}: Address already in use" in err


def test_a_port_that_is_opened_on_the_first_machine_may_be_in_use_here() -> None:
    with socket.create_server(("", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        launch._check_endpoint(effective_config(rdzv_endpoint=endpoint, nnodes=2, node_rank=1, cfg_parallel=2).ranks)


def test_machines_that_do_not_meet_are_said(start: Start) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    run = start(*SMALL, "--nnodes", "2", "--rdzv-endpoint", endpoint, "--rank-timeout", "1")
    code, _, err = run.end(60)
    assert code == 2 and f"--rdzv-endpoint {endpoint}: the 2 machines did not meet" in err


def test_ranks_import_nothing_from_the_working_folder(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "dataclasses.py").write_text("raise SystemExit('imported from the working folder')")
    started = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, **options: started.append(options["env"]))
    monkeypatch.setattr(sys, "path", [str(workdir), *sys.path])
    (workdir / "artifacts/runs/one/logs").mkdir(parents=True)
    launch._start(workdir / "artifacts/runs/one", 0, 0)
    monkeypatch.undo()
    environment = started[0] | {"PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "wanfast.runtime.facts.mesh"]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ranks_import_the_package_of_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another wanfast may be installed; a program may find its own by any entry of sys.path."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    command = [sys.executable, "-c", "import wanfast; print(wanfast.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=launch.child_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == str(PACKAGE / "wanfast/__init__.py"), done.stderr


def test_the_installed_packages_of_ranks_hide_no_standard_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(launch, "_IMPORTED_FROM", Path(pytest.__file__).parents[1])
    assert "PYTHONPATH" not in launch.child_environment()


def test_a_rank_that_gives_up_waiting_is_the_cause_of_its_peers_errors() -> None:
    timeout = {"rank": 0, "kind": "timeout", "time": 1_000_000_500}
    closed, later = ({"rank": 2, "kind": "bug", "time": time_ns} for time_ns in (1_000_000_000, 3_000_000_000))
    assert failures._first([closed, timeout]) == failures._first([later, timeout]) == timeout
    assert failures._first([{**timeout, "time": 3_000_000_000}, closed]) == closed  # it waited for the rank that failed
    assert failures._first([]) is None


def test_a_full_disk_neither_keeps_the_ranks_running_nor_costs_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request to end cannot be written, so the ranks are stopped."""
    stopped: list[bool] = []
    groups = launch.RankGroups(tmp_path, RanksConfig(device="cpu"), groups=0)
    monkeypatch.setattr(groups, "stop", lambda: stopped.append(True))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    groups.close()
    assert stopped == [True]


def test_a_rank_that_is_stopped_is_killed_and_no_other_process(tmp_path: Path) -> None:
    """A later process may have the id of a rank that ended."""
    with subprocess.Popen(["sleep", "60"]) as rank, subprocess.Popen(["sleep", "60"]) as other:
        for number, process in enumerate((rank, other)):
            file = tmp_path / f"ranks/7-{number}/pid"
            file.parent.mkdir(parents=True)
            file.write_text(str(process.pid))
        os.utime(file, (0, 0))
        rank.send_signal(signal.SIGSTOP)
        launch._kill_ranks(tmp_path, [7])
        assert rank.wait(10) == -signal.SIGKILL and other.poll() is None
        other.kill()
