"""Runs the server until a signal ends it: the ranks, the queue and HTTP."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from filelock import Timeout
from PIL import Image

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine.signals import stopped_by_signals
from wanfast.runtime.planning.shortened import few_lossy_steps, few_steps, least_steps, schedule_of
from wanfast.runtime.processes.handle import Handle, Opened
from wanfast.runtime.store.atomic import not_written
from wanfast.runtime.store.sharing import lock_of
from wanfast.server.app import Parts, create_app
from wanfast.server.checks import Checks, Served, needs_last_image
from wanfast.server.files import Files
from wanfast.server.keys import Keys
from wanfast.server.metrics import Metrics
from wanfast.server.settings import ServerSettings
from wanfast.server.store import FAULT, Store
from wanfast.server.worker import Worker

_CLOSING_S = 5  # connections get this long to end


def started(opened: Opened) -> Handle:
    """Starts the ranks of a server, which store no text: a client that deletes a video deletes its prompt too."""
    return Handle(opened, stores_texts=False)


def serve(
    settings: ServerSettings,
    opened: Opened,
    defaults: Mapping[str, Any],
    *,
    start: Callable[[Opened], Handle] = started,
) -> None:
    """Runs the server until SIGTERM or SIGINT.

    After the signal, the current video stops at its next step, and its job is queued again. A second signal ends the
    process and its ranks at once. In both cases the video is made later: by this server after a restart, or by another
    server that uses the same database.
    `defaults`: default options of `Handle.make` for all videos. `start`: the function that starts the ranks. Raises
    WanFastError.
    """
    keys = keys_of(settings)
    Files(settings.data_dir)
    with (
        _alone(settings),
        _listening(settings) as listener,
        parts_of(settings, keys, opened, defaults, start) as parts,
        stopped_by_signals(parts.worker.stop),
        _answering(create_app(parts), listener) as address,
    ):
        print(f"loading the models; the page is open at {address}", flush=True)
        parts.worker.run(lambda: print_ready(address))


def print_ready(address: str) -> None:
    """Prints that the server is ready: the models are loaded."""
    print(f"ready at {address}", flush=True)


def address_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def keys_of(settings: ServerSettings) -> Keys:
    """Reads the API keys from the file of --api-key-file; without a file, returns `Keys()`. Raises ConfigError."""
    return Keys.read(settings.api_key_file) if settings.api_key_file else Keys()


@contextmanager
def parts_of(
    settings: ServerSettings,
    keys: Keys,
    opened: Opened,
    defaults: Mapping[str, Any],
    start: Callable[[Opened], Handle] = started,
) -> Iterator[Parts]:
    """Opens the queue, starts the ranks, and yields `Parts`: the objects that the HTTP routes use.

    One of the objects is `Parts.worker`. The queued videos are made only while its method `run` runs, and the caller
    must call this method. The end of the `with` block ends the ranks. Raises WanFastError.
    """
    served, files = Served.of(opened, defaults, settings.max_clips), Files(settings.data_dir)
    warm_up = warm_up_of(opened, served, files)
    store = Store(settings.database_url)
    metrics = Metrics(store, has_gpus=opened.placed.config.ranks.device == "cuda")
    if not store.is_shared:
        metrics.failed(FAULT, store.recover(all_lost=True)[1])
    with start(opened) as handle:
        worker = Worker(
            store,
            handle,
            files,
            metrics,
            keep_s=settings.keep_hours * 3600,
            warm_up=warm_up,
            total_frames=served.total_frames,
        )
        yield Parts(
            store=store,
            worker=worker,
            files=files,
            checks=Checks(served),
            keys=keys,
            metrics=metrics,
            model=served.model,
            most_jobs=settings.max_queue,
            most_bytes=settings.max_upload_mb * 1_000_000,
        )
    store.close()


def warm_up_of(opened: Opened, served: Served, files: Files) -> dict[str, Any]:
    """Returns the options of the warm-up video: the server's default options, but few steps.

    If the model takes images, the warm-up video gets a grey image; this function writes the image into `files.folder`.
    If the server's recipe needs a last image, that is the same image.
    Raises WanFastError if a video with the default options and all their steps cannot be planned. So a server with
    wrong default options does not start.
    """
    image: dict[str, Any] = {}
    if served.spec.takes_images:
        grey = files.folder / "warm-up.png"  # no temporary file, because ranks that die are warmed up again
        try:
            # Another server may read the image, or write it too. In containers, both may have the same process id.
            with tempfile.TemporaryDirectory(prefix=f".{grey.name}.", dir=files.folder) as own:
                unfinished = Path(own) / grey.name
                Image.new("RGB", served.size, (127, 127, 127)).save(unfinished, "PNG")
                unfinished.replace(grey)
        except OSError as error:
            raise not_written(grey, error, "--data-dir") from error
        image["image"] = str(grey)
        if (recipe := opened.asked.get("recipe")) and needs_last_image(recipe):
            image["last_image"] = str(grey)
    size = "x".join(map(str, served.size))
    video = {**served.defaults, **image, **served.fit, "prompt": "warm-up", "seed": 0, "size": size}
    plan = opened.plan(video)
    least = least_steps(plan.config.video, served.spec)
    short = {**few_steps(video, schedule_of(plan.config.video, served.spec, least)), "frames": served.frames}
    return short | few_lossy_steps(plan)


@contextmanager
def _alone(settings: ServerSettings) -> Iterator[None]:
    """Holds the lock of the data folder, so that only one server uses the folder's SQLite database.

    A second server would treat the first server's running jobs as lost. Servers that share PostgreSQL share the folder
    without a lock. Raises ConfigError if another server holds the lock.
    """
    if settings.database is not None:
        yield
        return
    try:
        with lock_of(settings.data_dir / "lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"--data-dir {settings.data_dir}: another server uses this folder: give another folder"
        ) from None


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """Listens at the server's address, before the models are loaded. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        place = f"--host {settings.host} --port {settings.port}"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"{place}: {reason}: use an address and a port that are free") from None
    with listener:
        yield listener


@contextmanager
def _answering(app: Any, listener: socket.socket) -> Iterator[str]:
    """Answers requests in another thread, until the block ends; yields the server's address."""
    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's own would close every handler of this process
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http")
    thread.start()
    host, port = listener.getsockname()[:2]
    try:
        yield address_of(host, port)
    finally:
        server.should_exit = True
        thread.join()
