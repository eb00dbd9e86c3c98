"""Tests `wanfast serve` as a process: with the tiny model, with signals, and killed at any moment."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.error import URLError

import av
import psutil
import pytest
from sqlalchemy import select

from tests.conftest import Outcome
from tests.forked import ForkedPopen
from tests.processes.test_launch import with_fault
from tests.processes.test_losses import FAULTS
from tests.server.running import SMALL, STAR, Answer, StandIn, ask, data_url, until
from wanfast.commands import serve as serve_command
from wanfast.runtime.engine.pixels import Frame
from wanfast.runtime.jobs.generate import FramesFile
from wanfast.runtime.media.video_file import Mp4Writer
from wanfast.runtime.processes.handle import Opened
from wanfast.server import serve as serve_module
from wanfast.server.settings import ServerSettings
from wanfast.server.store import LEASE_S, Store
from wanfast.server.tables import JOBS
from wanfast.server.worker import Worker

NONE: Mapping[str, str] = {}
TINY = ("--model", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "4")


@dataclass
class Process:
    """Runs a server as a process, and starts it again if it is killed."""

    folder: Path
    module: str
    options: tuple[str, ...] = TINY
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[str] | None = None
    starts: int = 0
    killed_ranks: int = 0

    def start(self) -> None:
        """Starts the server and waits until it listens."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", self.module, "serve", *self.options, "--port", str(self.port)]
        with log.open("w") as errors:
            self.process = ForkedPopen(
                [*command, "--data-dir", str(self.folder / "data")],
                cwd=self.folder, env={**os.environ, **self.environment},
                stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert "the page is open at http://127.0.0.1:" in line, log.read_text()
        self.port = int(line.rpartition(":")[2])
        self.log = log
        self.starts += 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        until(lambda: self.answer("GET", "/ready").status == 200, 60)

    def answer(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = NONE) -> Answer:
        """Asks until the server answers, and is neither loading nor full."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with suppress(URLError, HTTPException, ConnectionError, TimeoutError):
                answer = ask(f"{self.url}{path}", method, body, headers)
                if answer.status not in (429, 503) or path == "/ready":
                    return answer
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def create(self, key: str, seed: int, prompt: str | None = None, **others: object) -> str:
        """Queues a video and returns its id; the request is repeated until it is acknowledged."""
        fields = {"prompt": prompt or f"star {seed}", "seed": seed, "input_reference": data_url(STAR.read_bytes())}
        fields |= others
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        answer = self.answer("POST", "/v1/videos", json.dumps(fields).encode(), headers)
        assert answer.status == 200, answer.body
        return str(answer.document["id"])

    def ended(self, video: str) -> dict[str, object]:
        while True:
            shown = self.answer("GET", f"/v1/videos/{video}")
            assert shown.status == 200, shown.body
            if shown.document["status"] in ("completed", "failed"):
                return dict(shown.document)
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def kill_a_rank(self, at_random: random.Random) -> bool:
        """Kills one of the ranks and waits for its end; returns False if none lives now."""
        with suppress(psutil.NoSuchProcess, IndexError):
            rank = at_random.choice(self.ranks())
            if rank.status() != psutil.STATUS_ZOMBIE:
                rank.kill()
                psutil.wait_procs([rank], timeout=10)
                self.killed_ranks += 1
                return True
        return False

    def ranks(self) -> list[psutil.Process]:
        """Returns the processes that the launchers started."""
        assert self.process
        with suppress(psutil.NoSuchProcess):
            launchers = psutil.Process(self.process.pid).children()
            return [rank for launcher in launchers for rank in launcher.children()]
        return []


@contextmanager
def served(process: Process) -> Iterator[Process]:
    process.start()
    try:
        yield process
    finally:
        if process.process and process.process.poll() is None:
            process.kill()


@pytest.fixture
def stand_in(workdir: Path) -> Iterator[Process]:
    with served(Process(workdir, "tests.server.killed")) as process:
        process.wait()
        yield process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("tiny")
    with served(Process(folder, "wanfast", (*TINY, "--artifacts-dir", str(folder / "artifacts")))) as process:
        process.wait()
        yield process


def one(folder: Path, wanfast: Callable[..., Outcome], seed: int, clips: int = 1) -> bytes:
    """Returns the mp4 that `wanfast generate` makes of what `Process.create` asks for."""
    output = f"{seed}.mp4"
    prompts = ("--prompt", f"star {seed}") * clips
    video = ("--image", str(STAR), *prompts, "--seed", str(seed), "--fit", "crop", "--output", output)
    outcome = wanfast("generate", *TINY, *video)
    assert outcome.exit_code == 0, outcome.err
    return (folder / output).read_bytes()


def in_one_list(folder: Path, wanfast: Callable[..., Outcome], seeds: range) -> dict[int, bytes]:
    """Returns the same for several seeds, which one run of `wanfast generate` makes."""
    lines = [{"prompt": f"star {seed}", "seed": seed, "output": f"list-{seed}.mp4"} for seed in seeds]
    (folder / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    outcome = wanfast("generate", *TINY, "--image", str(STAR), "--fit", "crop", "--jobs", "jobs.jsonl")
    assert outcome.exit_code == 0, outcome.err
    return {seed: (folder / f"list-{seed}.mp4").read_bytes() for seed in seeds}


def test_the_server_says_that_it_is_ready_when_it_takes_videos(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is open before, and a video that is sent too early is refused."""
    workers: list[Worker] = []
    monkeypatch.setattr(serve_module, "stopped_by_signals", lambda stop: nullcontext(workers.append(stop.__self__)))
    opened, holds = Opened.of({**SMALL, "artifacts_dir": str(workdir / "artifacts")}), threading.Event()
    settings = ServerSettings(host="127.0.0.1", port=0, data_dir=workdir / "data")

    def start(opened: Opened) -> StandIn:
        maker = StandIn(opened)
        maker.holds = holds
        return maker

    def create() -> int:
        body = json.dumps({"prompt": "a star", "input_reference": data_url(STAR.read_bytes())}).encode()
        return ask(f"{address}/v1/videos", "POST", body, {"Content-Type": "application/json"}).status

    holds.set()
    server = threading.Thread(target=serve_module.serve, args=(settings, opened, {"steps": 3}), kwargs={"start": start})
    server.start()
    try:
        printed: list[str] = []
        until(lambda: printed.append(capsys.readouterr().out) or "".join(printed).endswith("\n"))
        words, _, address = "".join(printed).strip().rpartition(" ")
        assert words == "loading the models; the page is open at"
        assert ask(f"{address}/").status == 200 and create() == 503 and capsys.readouterr().out == ""
        holds.clear()
        until(lambda: workers[0].is_ready)
        assert create() == 200
    finally:
        workers[0].stop()
        server.join()
    assert capsys.readouterr().out == f"ready at {address}\n"


def test_a_video_of_the_server_is_that_of_generate(
    tiny: Process, workdir: Path, wanfast: Callable[..., Outcome]
) -> None:
    video = tiny.create("first", 3)
    shown = tiny.ended(video)
    assert shown["status"] == "completed", shown
    assert tiny.answer("GET", f"/v1/videos/{video}/content").body == one(workdir, wanfast, 3)
    assert b'wanfast_stage_seconds_count{stage="denoise"} 1.0' in tiny.answer("GET", "/metrics").body


def test_x264_begins_while_later_frames_are_decoded(
    workdir: Path, wanfast: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's last frames wait for x264. The file is hidden until it is complete."""
    add, begin, encoding = FramesFile.add, Mp4Writer._open, workdir / "encoding"

    def waiting(self: FramesFile, frames: Iterable[Frame]) -> None:
        ends = time.monotonic() + 5
        while self._file.name == "1.npy" and self._stream is not None and time.monotonic() < ends:
            if encoding.exists():
                (workdir / "overlapped").touch()
                break
            time.sleep(0.01)
        add(self, frames)

    monkeypatch.setattr(FramesFile, "add", waiting)
    monkeypatch.setattr(Mp4Writer, "_open", lambda self, *shape: (begin(self, *shape), encoding.touch()))
    with served(Process(workdir, "wanfast", TINY)) as process:
        process.wait()
        video = process.create("first", 3)  # after the warm-up
        assert process.ended(video)["status"] == "completed" and (workdir / "overlapped").exists()
        assert process.answer("GET", f"/v1/videos/{video}/content").body == one(workdir, wanfast, 3)
        assert not list(workdir.glob("data/.*.part"))


def test_a_long_video_is_that_of_generate_with_several_prompts(
    tiny: Process, workdir: Path, wanfast: Callable[..., Outcome]
) -> None:
    video = tiny.create("long", 3, seconds="0.75")
    shown = tiny.ended(video)
    assert shown["status"] == "completed" and shown["seconds"] == "0.75", shown
    assert tiny.answer("GET", f"/v1/videos/{video}/content").body == one(workdir, wanfast, 3, clips=3)


def test_a_video_between_two_images_is_that_of_generate(
    tiny: Process, workdir: Path, wanfast: Callable[..., Outcome]
) -> None:
    last = STAR.with_name("cat.jpg")
    video = tiny.create("between", 3, last_image=data_url(last.read_bytes()))
    assert tiny.ended(video)["status"] == "completed"
    given = ("--image", str(STAR), "--last-image", str(last), "--prompt", "star 3", "--seed", "3", "--fit", "crop")
    assert wanfast("generate", *TINY, *given, "--output", "between.mp4").exit_code == 0
    assert tiny.answer("GET", f"/v1/videos/{video}/content").body == (workdir / "between.mp4").read_bytes()


def test_the_text_of_a_video_is_nowhere_but_in_the_data_folder(tiny: Process) -> None:
    prompt = "an unmistakable star"
    assert tiny.ended(tiny.create("text", 3, prompt=prompt))["status"] == "completed"
    until(lambda: files_with(tiny.folder / "data", prompt))
    assert not files_with(tiny.folder / "artifacts", prompt)


def files_with(folder: Path, text: str) -> list[Path]:
    """Returns the files below a folder that hold a text."""
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_a_video_whose_rank_is_killed_is_made_all_the_same(tiny: Process) -> None:
    videos = [tiny.create(f"killed {seed}", seed) for seed in range(3)]
    until(lambda: tiny.answer("GET", f"/v1/videos/{videos[0]}").document["status"] == "in_progress")
    for rank in tiny.ranks():
        rank.kill()
    assert [tiny.ended(video)["status"] for video in videos] == ["completed"] * 3
    assert tiny.answer("GET", "/ready").status == 200


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_video_whose_rank_hangs_is_made_by_new_ranks(workdir: Path, ranks: int) -> None:
    """A rank stops in the middle of a video, but does not end; a peer waits for it."""
    options = (*TINY, "--steps", "200", "--num-gpus", str(ranks), "--rank-timeout", "2")
    with served(Process(workdir, "wanfast", options)) as process:
        process.wait()
        before = process.ranks()
        assert len(before) == ranks
        videos = [process.create(str(seed), seed) for seed in range(2)]
        until(lambda: process.answer("GET", f"/v1/videos/{videos[0]}").document["stage"] == "high noise")
        before[-1].suspend()
        assert [process.ended(video)["status"] for video in videos] == ["completed", "completed"]
        assert _attempts(workdir) == [2, 1]
        assert "hangs" in process.log.read_text()
        assert [rank for rank in before if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE] == []
        assert b"wanfast_rank_failures_total 1.0" in process.answer("GET", "/metrics").body
        assert process.answer("GET", "/ready").status == 200


@pytest.mark.long
def test_a_video_whose_rank_always_hangs_fails_and_the_next_one_is_made(workdir: Path) -> None:
    environment = {"PYTHONPATH": with_fault(workdir, FAULTS, rank=1, replica=None)["PYTHONPATH"]}
    options = (*TINY, "--num-gpus", "2", "--rank-timeout", "2")
    with served(Process(workdir, "wanfast", options, environment)) as process:
        process.wait()
        videos = [process.create(str(seed), seed, prompt) for seed, prompt in enumerate(("a rank hangs", "a star"))]
        hung, made = [process.ended(video) for video in videos]
        assert (hung["status"], hung["error"]["code"]) == ("failed", "rank_failed")  # type: ignore[index]
        assert made["status"] == "completed" and _attempts(workdir) == [3, 1]
        assert process.log.read_text().count("waited --rank-timeout 2 s for rank 1, which hangs") == 3
        assert b"wanfast_rank_failures_total 3.0" in process.answer("GET", "/metrics").body


def _attempts(folder: Path) -> list[int]:
    """Returns how often each video was begun, the first one first."""
    store = Store(f"sqlite:///{folder}/data/jobs.sqlite")
    with store._engine.connect() as connection:
        attempts = list(connection.execute(select(JOBS.c.attempts).order_by(JOBS.c.number)).scalars())
    store.close()
    return attempts


def test_sigterm_ends_the_server_and_no_job(workdir: Path, stand_in: Process) -> None:
    videos = [stand_in.create(str(seed), seed) for seed in range(20)]
    assert stand_in.stop() == 0, stand_in.log.read_text()
    assert "Traceback" not in stand_in.log.read_text()
    assert stand_in.log.read_text().count("note: the server is stopping: ") == 1
    counts = _states(workdir)
    assert counts["queued"] > 0 and counts["in_progress"] == 0 and sum(counts.values()) == 20
    stand_in.start()
    assert {stand_in.ended(video)["status"] for video in videos} == {"completed"}


def test_the_job_of_a_killed_server_is_made_as_soon_as_the_next_one_runs(workdir: Path) -> None:
    with served(Process(workdir, "tests.server.killed", (*TINY, "--steps", "100"))) as process:
        process.wait()
        video = process.create("a", 1)
        until(lambda: process.answer("GET", f"/v1/videos/{video}").document["stage"] == "high noise")
        process.kill()
        process.start()
        until(lambda: process.answer("GET", f"/v1/videos/{video}").document["status"] == "completed", LEASE_S / 2)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_second_signal_ends_the_server_at_once(workdir: Path, stand_in: Process, at_once: bool) -> None:
    """The server is in a step of a minute, which the first signal does not end."""
    video, process = stand_in.create("a", 1, "a long step"), stand_in.process
    assert process
    until(lambda: stand_in.answer("GET", f"/v1/videos/{video}").document["stage"] == "high noise")
    if at_once:
        process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    if not at_once:
        until(lambda: stand_in.answer("GET", "/ready").document["status"] == "stopping")
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=20) == 143, stand_in.log.read_text()
    assert _states(workdir) == {"in_progress": 1}  # as after a kill: the next server makes it


@pytest.mark.long
def test_a_second_signal_ends_the_ranks_too(workdir: Path) -> None:
    with served(Process(workdir, "wanfast", (*TINY, "--steps", "500", "--num-gpus", "2"))) as process:
        process.wait()
        video, ranks = process.create("a", 1), process.ranks()
        until(lambda: process.answer("GET", f"/v1/videos/{video}").document["stage"] == "high noise")
        assert process.process and len(ranks) == 2
        for _ in range(2):
            process.process.terminate()
            until(lambda: process.process.poll() is not None or _is_stopping(process))
        assert process.process.wait(timeout=5) == 143
        until(lambda: not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE])


def _is_stopping(process: Process) -> bool:
    with suppress(URLError, ConnectionError):
        return bool(ask(f"{process.url}/ready").document["status"] == "stopping")
    return False


def _states(folder: Path) -> Counter[str]:
    store = Store(f"sqlite:///{folder}/data/jobs.sqlite")
    with store._engine.connect() as connection:
        states = Counter(connection.execute(select(JOBS.c.status)).scalars())
    store.close()
    return states


def test_a_server_without_its_packages_names_them(
    wanfast: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None if name == "uvicorn" else name)
    outcome = wanfast("serve")
    assert outcome.exit_code == 2
    assert outcome.err == "error: the server needs uvicorn: run `pip install 'wanfast[serve]'`\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "--port 70000: use 0 to 65535"),
        (("--frames", "10"), "--frames 10: a video has 4n+1 frames: try 9 or 13"),
        (("--replicas", "2"), "--replicas needs a cluster"),
        (("--attention", "fa3", "--device", "cpu"), "--attention fa3 needs a GPU"),
        (("--model", "tinny"), "--model tinny: no such folder: did you mean tiny?"),
    ],
)
def test_wrong_options_are_refused_before_packages_are_asked_for(
    wanfast: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None)
    outcome = wanfast("serve", *arguments)
    assert outcome.exit_code == 2 and message in outcome.err


def test_two_servers_cannot_share_a_folder(workdir: Path, stand_in: Process) -> None:
    second = Process(workdir, "tests.server.killed")
    with pytest.raises(AssertionError, match="another server uses this folder"):
        second.start()
    assert second.process and second.process.wait(timeout=20) == 2


def test_a_port_that_is_taken_is_an_error_of_one_line(workdir: Path, stand_in: Process) -> None:
    options = (*TINY, "--port", str(stand_in.port), "--data-dir", "other")
    command = [sys.executable, "-m", "tests.server.killed", "serve", *options]
    done = ForkedPopen(command, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = done.communicate(timeout=20)
    assert done.returncode == 2 and out == ""
    assert re.fullmatch(r"error: --host 127\.0\.0\.1 --port \d+: Address already in use: use an .*\n", err), err


def storm(
    process: Process, jobs: int, clients: int, kills: int, rank_kills: int, *, at_random: random.Random
) -> dict[int, tuple[str, bytes]]:
    """Lets clients ask for videos while the server and its ranks are killed; returns {seed: (id, mp4)}.

    A client stores what was acknowledged, and only then waits for its end.
    """
    made: dict[int, tuple[str, bytes]] = {}
    ended = threading.Event()

    def client(number: int) -> None:
        for seed in range(number, jobs, clients):
            video = process.create(f"job {seed}", seed)
            again = process.create(f"job {seed}", seed)
            assert again == video
            shown = process.ended(video)
            assert shown["status"] == "completed", shown
            made[seed] = video, process.answer("GET", f"/v1/videos/{video}/content").body

    def killer() -> None:
        victims = [True] * kills + [False] * rank_kills
        at_random.shuffle(victims)
        for index, is_server in enumerate(victims, start=1):
            until(lambda index=index: len(made) >= jobs * index // (len(victims) + 2) or ended.is_set(), 600)
            time.sleep(at_random.random() * 0.3)
            if ended.is_set():
                return
            if is_server:
                process.kill()
                process.start()
            else:
                until(lambda: ended.is_set() or process.kill_a_rank(at_random), 60)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(client, number) for number in range(clients)]:
                done.result()
    finally:
        ended.set()
        thread.join()
    return made


def check(folder: Path, made: dict[int, tuple[str, bytes]], jobs: int) -> None:
    """Checks that there is one job for each that was acknowledged, that it has ended, and one file for each."""
    assert sorted(made) == list(range(jobs))
    assert _states(folder) == {"completed": jobs}
    assert len({video for video, _ in made.values()}) == jobs
    files = list((folder / "data").glob("video_*.mp4"))
    assert {file.name.partition("-")[0] for file in files} == {video for video, _ in made.values()}
    until(lambda: len(list((folder / "data").glob("video_*.mp4"))) == jobs)


def test_a_server_that_is_killed_loses_no_job_and_makes_none_twice(workdir: Path, stand_in: Process) -> None:
    made = storm(stand_in, jobs=24, clients=6, kills=4, rank_kills=0, at_random=random.Random(1))
    check(workdir, made, 24)
    assert stand_in.starts == 5
    assert len({hashlib.sha256(video).hexdigest() for _, video in made.values()}) == 24


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_hundred_jobs_outlive_five_servers_and_ten_ranks(workdir: Path, wanfast: Callable[..., Outcome]) -> None:
    """Runs the tiny model: every acknowledged job ends once, and its video is that of a single run."""
    options = (*TINY, "--artifacts-dir", str(workdir / "artifacts"), "--max-queue", "50")
    with served(Process(workdir, "wanfast", options)) as process:
        process.wait()
        made = storm(process, jobs=200, clients=16, kills=5, rank_kills=10, at_random=random.Random(os.getpid()))
        check(workdir, made, 200)
        assert (process.starts, process.killed_ranks) == (6, 10)
    assert {_frames(video) for _, video in made.values()} == {5}
    alone = in_one_list(workdir, wanfast, range(200))
    assert [seed for seed in range(200) if made[seed][1] != alone[seed]] == []
    for seed in range(0, 200, 20):
        assert alone[seed] == one(workdir, wanfast, seed)


def _frames(video: bytes) -> int:
    """Returns how many frames an mp4 decodes to."""
    with av.open(io.BytesIO(video)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_memory_of_a_server_and_of_its_ranks_stays_the_same(tiny: Process) -> None:
    """Compares the megabytes of the server's own process, its launcher and its rank after 40 and after 200 videos."""
    assert tiny.process
    own, (rank,) = psutil.Process(tiny.process.pid), tiny.ranks()
    (launcher,) = own.children()
    processes, sizes = {"server": own, "launcher": launcher, "rank": rank}, []
    for round_ in range(5):
        for video in [tiny.create(f"memory {round_} {seed}", seed) for seed in range(40)]:
            assert tiny.ended(video)["status"] == "completed"
        sizes.append({name: process.memory_info().rss / 1e6 for name, process in processes.items()})
    print(sizes)
    assert tiny.ranks() == [rank]  # the same one made all videos
    assert all(sizes[-1][name] - sizes[0][name] < 10 for name in processes), sizes


@pytest.mark.long
@pytest.mark.timeout(300)
def test_little_time_lies_between_two_videos_and_answers_come_soon(tiny: Process) -> None:
    """Encoding, denoising and decoding aside. Meanwhile, 16 clients ask for a video ten times a second each."""
    count, ended = 20, threading.Event()
    videos = [tiny.create(f"between {seed}", seed) for seed in range(count + 1)]

    def client(number: int) -> list[float]:
        waits = []
        while not ended.wait(0.1):
            waits.append(_first_byte_s(tiny.port, f"/v1/videos/{videos[number]}"))
        return waits

    tiny.ended(videos[0])
    with ThreadPoolExecutor(16) as pool:
        clients, started = [pool.submit(client, number) for number in range(16)], time.perf_counter()
        try:
            until(lambda: tiny.answer("GET", f"/v1/videos/{videos[-1]}").document["status"] == "completed", 200)
        finally:
            whole = time.perf_counter() - started
            ended.set()
        answers = sorted(seconds for waits in clients for seconds in waits.result())
    stages = [tiny.answer("GET", f"/v1/videos/{video}").document["seconds_by_stage"] for video in videos[1:]]
    between = (whole - sum(seconds["total"] - seconds["write"] for seconds in stages)) / count
    median, late = statistics.median(answers), answers[len(answers) * 95 // 100]
    print(f"{between:.3f} s between two videos; {len(answers)} answers began in {median:.4f} s, 95 % in {late:.4f} s")
    assert between <= 0.1 and median < 0.02 and len(answers) > 16 * 10


def _first_byte_s(port: int, path: str) -> float:
    """Returns the seconds from a new connection to the first byte of an answer's body."""
    started, connection = time.perf_counter(), HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read(1)
        return time.perf_counter() - started
    finally:
        connection.close()
