"""Times the pauses of a warm server: `wanfast serve` as a user starts it, with jobs that come over HTTP.

    python benchmarks/served.py --random --steps 4 --size 1280x720 --num-gpus 4      # other options go to `serve`
    python benchmarks/served.py --random --layers 1 --steps 2 --size 64x64 --frames 5 --device cpu    # a quick check
    python benchmarks/served.py --model tiny --steps 2 --size 64x64 --frames 5 --device cpu           # another

With --random the model has the A14B's size and random weights, as in `whole_video.py`; else --model names it. Two
videos are made alone: `wall_s` is from the request to the answer that the video is completed. `beyond_denoising_s`
leaves out denoising, and `beyond_stages_s` also all other stages and the writing of the mp4. Then --videos are queued
at once. `pauses_s` are from the end of one denoising to the begin of the next, without decoding the one video and
encoding the next; a `sitecustomize` in the first rank notes these moments. Meanwhile, --clients ask for a video
and for the stream of changes, each time on a new connection. `first_byte_s` is until the first byte of the answer's
body. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from commands import KNOWN, PICTURE, end_by_signals, hooked, scratch_place, write_apart

from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.machine import host
from wanfast.runtime.machine.gpus import set_environment, visible_gpus
from wanfast.runtime.machine.packages import commit, versions

READY = "ready at "
STAGES = ("encode", "denoise", "decode")
POLL_S = 0.01  # between two looks at a video that is waited for
CLIENT_S = 0.1  # between two requests of a client
MARKS = """
def follow(module):
    span = module.Stopwatch.span

    @contextlib.contextmanager
    def marked(self, name):
        with span(self, name):
            started = time.time()
            yield
        if os.environ.get("RANK") == "0":
            note(json.dumps([name, started, time.time()]))

    module.Stopwatch.span = marked

AFTER = {"wanfast.runtime.device.timing": follow}
"""


Spans = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Server:
    """Holds the address of a running server, and the seconds until it was ready."""

    host: str
    port: int
    ready_s: float

    def ask(self, method: str, path: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = HTTPConnection(self.host, self.port, timeout=60)
        try:
            body = None if fields is None else json.dumps(fields)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            raise SystemExit(f"{method} {path}: {answer.status} {text}")
        found: dict[str, Any] = json.loads(text)
        return found

    def create(self, seed: int) -> str:
        """Queues a video and returns its id."""
        picture = f"data:image/jpeg;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
        fields = {"prompt": KNOWN, "seed": seed, "input_reference": {"image_url": picture}}
        return str(self.ask("POST", "/v1/videos", fields)["id"])

    def ended(self, video: str) -> dict[str, Any]:
        """Waits until a video is completed, and returns it."""
        while (shown := self.ask("GET", f"/v1/videos/{video}"))["status"] != "completed":
            if shown["status"] == "failed":
                raise SystemExit(f"{video}: {shown['error']}")
            time.sleep(POLL_S)
        return shown

    def first_byte_s(self, path: str) -> float:
        """Returns the seconds from a new connection to the first byte of an answer's body."""
        started, connection = time.perf_counter(), HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("GET", path)
            connection.getresponse().read(1)
            return time.perf_counter() - started
        finally:
            connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the model that is served, such as tiny")
    parser.add_argument("--random", action="store_true", help="a model of random weights instead")
    parser.add_argument(
        "--layers", type=int, default=A14B.dit.num_layers, help="layers of each expert, and of UMT5, at most 24"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder of the random model, written if missing; temporary by default"
    )
    parser.add_argument("--videos", type=int, default=3, help="number of videos that are queued at once")
    parser.add_argument("--clients", type=int, default=4, help="number of clients that ask while videos are made")
    options, others = parser.parse_known_args()
    if (options.model is None) != options.random:
        parser.error("give either --model or --random")
    if options.videos < 2 or options.clients < 1:
        parser.error("--videos must be 2 or more, and --clients 1 or more")
    end_by_signals()
    set_environment()  # as for the command, because random weights are drawn on a GPU
    with tempfile.TemporaryDirectory(dir=scratch_place(options)) as scratch:
        model = options.model or options.folder or Path(scratch) / "model"
        if options.random and not Path(model).exists():
            write_apart(model, options)
        with _serving(Path(scratch), [f"--model={model}", *others]) as server:
            facts = _measure(server, Path(scratch), options)
    hardware = {"cpu": platform.processor() or platform.machine(), "cores": host.cores()}
    hardware["gpus"] = [gpu.name for gpu in visible_gpus()]
    asked = {"model": "random" if options.random else options.model, "options": others}
    print(json.dumps({**asked, **facts, "hardware": hardware, "commit": commit(), "versions": versions()}))


@contextmanager
def _serving(scratch: Path, options: list[str]) -> Iterator[Server]:
    """Runs `wanfast serve` on a free port until the block ends; yields when it is ready."""
    (scratch / "marks").touch()
    environment = {**os.environ, **hooked(scratch, MARKS)}
    places = ("--port=0", f"--artifacts-dir={scratch}/artifacts", f"--data-dir={scratch}/data")
    command = [sys.executable, "-m", "wanfast", "serve", *places, *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next((line[len(READY) :].strip() for line in process.stdout if line.startswith(READY)), None)
        if address is None:
            raise SystemExit(process.wait() or 1)  # the server has printed its error
        url = urlsplit(address)
        assert url.hostname is not None and url.port is not None
        yield Server(url.hostname, url.port, round(time.perf_counter() - started, 3))
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def _measure(server: Server, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    alone = [_alone(server, seed) for seed in range(2)]
    before = len(_videos_of(scratch / "marks"))
    videos = [server.create(seed) for seed in range(options.videos)]
    ended = threading.Event()
    with ThreadPoolExecutor(options.clients) as pool:
        clients = [pool.submit(_ask_again, server, videos[-1], ended) for _ in range(options.clients)]
        try:
            last = [server.ended(video) for video in videos][-1]
        finally:
            ended.set()
    found = _videos_of(scratch / "marks")[before:]
    pauses = [_pause(old, new) for old, new in itertools.pairwise(found)]
    assert len(pauses) == options.videos - 1, "one rank makes all videos, one after the other"
    waits = {kind: [each for client in clients for each in client.result()[kind]] for kind in ("video", "events")}
    return {
        "plan": {name: last["plan"][name] for name in ("width", "height", "frames", "forwards", "device", "mesh")},
        "ready_s": server.ready_s,
        "alone": alone,
        "pauses_s": pauses,
        "pause_s": {"median": round(statistics.median(pauses), 4), "largest": max(pauses)},
        "clients": options.clients,
        "first_byte_s": {kind: _spread(found) for kind, found in waits.items()},
    }


def _alone(server: Server, seed: int) -> dict[str, Any]:
    """Makes a video that waits for no other one; returns its seconds."""
    started = time.perf_counter()
    stages = server.ended(server.create(seed))["seconds_by_stage"]
    wall = time.perf_counter() - started
    beyond = {"beyond_denoising_s": wall - stages["denoise"], "beyond_stages_s": wall - stages["total"]}
    row = {"wall_s": wall, **beyond}
    return {name: round(value, 3) for name, value in row.items()} | {"stages": stages}


def _ask_again(server: Server, video: str, ended: threading.Event) -> dict[str, list[float]]:
    """Asks until `ended` is set; returns the seconds until the first bytes."""
    paths = {"video": f"/v1/videos/{video}", "events": "/v1/videos/events"}
    found: dict[str, list[float]] = {kind: [] for kind in paths}
    while not (ended.is_set() and all(found.values())):
        for kind, path in paths.items():
            found[kind].append(server.first_byte_s(path))
            ended.wait(CLIENT_S)
    return found


def _videos_of(marks: Path) -> list[Spans]:
    """Returns for each video the (begin, end) of each span of its stages, in seconds of the clock."""
    videos: list[Spans] = []
    for line in marks.read_text().splitlines():
        name, started, ended = json.loads(line)
        if name == STAGES[0]:
            videos.append({stage: [] for stage in STAGES})
        if name in STAGES:
            videos[-1][name].append((started, ended))
    return videos


def _pause(old: Spans, new: Spans) -> float:
    """Returns the seconds from the end of one denoising to the begin of the next, without decoding and encoding."""
    work = sum(ended - started for started, ended in (*old["decode"], *new["encode"]))
    return round(new["denoise"][0][0] - old["denoise"][-1][1] - work, 4)


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {"median": statistics.median(values), "of_95_percent": ordered[len(ordered) * 95 // 100]}
    return {name: round(value, 4) for name, value in found.items()} | {
        "largest": round(ordered[-1], 4),
        "of": len(values),
    }


if __name__ == "__main__":
    main()
