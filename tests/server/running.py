"""Runs a server in this process for tests, with a stand-in for the handle that makes videos of one colour at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import uvicorn.server

from wanfast.runtime.errors import CancelledError
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.progress import StageFn, stage_of_clip
from wanfast.runtime.processes.handle import Opened, RecordFn, Video
from wanfast.runtime.store.model_files import TINY
from wanfast.server import serve as serve_module
from wanfast.server.app import Parts, create_app
from wanfast.server.checks import Checks, Served
from wanfast.server.files import Files
from wanfast.server.keys import Keys
from wanfast.server.metrics import Metrics
from wanfast.server.settings import ServerSettings
from wanfast.server.store import Store
from wanfast.server.worker import Worker

STAR = TINY.parent / "examples/star.png"
SMALL = {"model": "tiny", "device": "cpu", "size": "64x64", "frames": 5}
WARM_UP = "warm-up"
NO_KEYS = Keys()
NONE: Mapping[str, str] = {}
_HASTY = {**vars(asyncio), "sleep": lambda seconds: asyncio.sleep(seconds / 10)}
# uvicorn looks every tenth of a second whether it shall end, and then sleeps for another one.
vars(uvicorn.server)["asyncio"] = SimpleNamespace(**_HASTY)


def colour(seed: int) -> int:
    """Returns the grey of a stand-in's video; seeds that follow each other give greys that an mp4 tells apart."""
    return seed * 10 % 256


class StandIn:
    """Makes a video of the colour that its seed says, in as many steps as a real one has."""

    def __init__(self, opened: Opened, step_s: float = 0.0) -> None:
        self.opened, self.step_s = opened, step_s
        self.made: list[dict[str, Any]] = []  # the options of each video that was begun
        self.errors: list[BaseException] = []  # raised one after the other, instead of videos
        self.holds = threading.Event()  # set: a video does not end before it is cancelled
        self.cancelled = threading.Event()
        self.decoding: Callable[[], object] = lambda: None  # is called between two groups of frames
        self.closed = False

    def make(self, *, on_progress: StageFn, on_frames: RecordFn, **options: Any) -> Video:
        plan = self.opened.plan(options)
        if options["prompt"] != WARM_UP:
            files = {"picture": options.get("image"), "last_picture": options.get("last_image")}
            self.made.append({**options, **{name: Path(file).read_bytes() for name, file in files.items() if file}})
            if self.errors:
                raise self.errors.pop(0)
        self.cancelled.clear()
        steps, clips = plan.config.video.num_steps, len(plan.config.video.prompts)
        for clip, step in itertools.product(range(1, clips + 1), range(steps)):
            on_progress(stage_of_clip(clip, clips, "high noise"), step, steps)
            time.sleep(self.step_s)
            while self.holds.is_set() and not self.cancelled.is_set():
                time.sleep(0.01)
            if self.cancelled.is_set():
                raise CancelledError
        shape = (plan.config.video.total_frames, plan.geometry.height, plan.geometry.width, 3)
        document = sidecar.with_seconds(sidecar.planned(plan), {}, {"encode": 0.01, "denoise": 0.02, "decode": 0.01})
        video = Video(np.full(shape, colour(plan.config.video.seed), np.uint8), document)
        for first in range(0, len(video.frames), 4):
            on_frames(plan, video.frames[first : first + 4])
            if options["prompt"] != WARM_UP:
                self.decoding()
        return video

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Answer:
    """Holds an answer of the server."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.document["error"]


@dataclass
class Running:
    """Holds a running server and its parts."""

    url: str
    parts: Parts
    maker: StandIn
    store: Store
    worker: Worker
    files: Files
    thread: threading.Thread = field(default_factory=threading.Thread)  # of the worker
    errors: list[BaseException] = field(default_factory=list)  # that ended the worker

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = NONE, **fields: Any
    ) -> Answer:
        """Sends a request; `fields` become a JSON object."""
        if fields:
            body, headers = json.dumps(fields).encode(), {"Content-Type": "application/json", **headers}
        return ask(f"{self.url}{path}", method, body, headers)

    def create(self, **fields: Any) -> str:
        """Queues a video and returns its id."""
        given = {"prompt": "a star", "input_reference": data_url(STAR.read_bytes()), **fields}
        answer = self.ask("POST", "/v1/videos", **given)
        assert answer.status == 200, answer.body
        return str(answer.document["id"])

    def show(self, video: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/v1/videos/{video}")
        assert answer.status == 200, answer.body
        return dict(answer.document)

    def metric(self, name: str) -> float:
        """Returns the value of a metric, with its labels as they are printed; 0 if it is not there."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return next((float(line.removeprefix(name)) for line in lines if line.startswith(f"{name} ")), 0.0)

    def ended(self, video: str) -> dict[str, Any]:
        """Waits until a video has ended, and returns it."""
        until(lambda: self.show(video)["status"] in ("completed", "failed"))
        return self.show(video)


def ask(url: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] = NONE) -> Answer:
    request = urllib.request.Request(url, data=body, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def data_url(picture: bytes) -> dict[str, str]:
    import base64

    return {"image_url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)


@contextmanager
def running(
    folder: Path,
    url: str | None = None,
    *,
    keys: Keys = NO_KEYS,
    defaults: Mapping[str, Any] = {"steps": 3},
    options: Mapping[str, Any] = SMALL,
    most_jobs: int = 100,
    most_bytes: int = 2_000_000,
    keep_s: float = 3600,
    max_clips: int | None = 3,
    waits: bool = True,
) -> Iterator[Running]:
    """Runs a server until the block ends; `waits`: until it is ready."""
    opened = Opened.of({**options, "artifacts_dir": str(folder / "artifacts")})
    settings = ServerSettings(host="127.0.0.1", port=0, data_dir=folder / "data")
    served, files, store = (
        Served.of(opened, defaults, max_clips),
        Files(settings.data_dir),
        Store(url or settings.database_url),
    )
    maker, metrics = StandIn(opened), Metrics(store, has_gpus=False)
    if not waits:
        maker.holds.set()
    warm_up = serve_module.warm_up_of(opened, served, files)
    worker = Worker(store, maker, files, metrics, keep_s=keep_s, warm_up=warm_up, total_frames=served.total_frames)
    parts = Parts(store, worker, files, Checks(served), keys, metrics, served.model, most_jobs, most_bytes)
    with serve_module._listening(settings) as listener, serve_module._answering(create_app(parts), listener):
        host, port = listener.getsockname()
        server = Running(f"http://{host}:{port}", parts, maker, store, worker, files)

        def work() -> None:
            try:
                worker.run()
            except BaseException as error:  # noqa: BLE001 - a test looks at it
                server.errors.append(error)

        server.thread = threading.Thread(target=work)
        server.thread.start()
        if waits:
            until(lambda: worker.is_ready)
        try:
            yield server
        finally:
            worker.stop()
            server.thread.join()
    store.close()
