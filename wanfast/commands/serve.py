"""`wanfast serve`: keeps the models loaded, and makes videos that clients request over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from wanfast.commands import options
from wanfast.runtime.config import accepted, default_artifacts_dir
from wanfast.runtime.config.option import FILES, SERVER, absolute
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine.packages import install
from wanfast.runtime.processes.handle import OF_ALL_VIDEOS, OF_HANDLE, Opened, checked
from wanfast.server.settings import ServerSettings


@options.takes_options("serve")
def serve(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. If other machines can reach this address, --api-key-file is needed.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on. 0 chooses a free port.", rich_help_panel=SERVER)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key on each line. A client sends one key, and sees only the jobs of this key.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Largest number of videos that may wait. Further requests are refused.", rich_help_panel=SERVER
        ),
    ] = 100,
    max_upload_mb: Annotated[
        int, typer.Option(help="Largest size of a request, in megabytes.", rich_help_panel=SERVER)
    ] = 32,
    keep_hours: Annotated[
        float,
        typer.Option(
            help="Hours for which a finished video can be downloaded. Then the server deletes the video.",
            rich_help_panel=SERVER,
        ),
    ] = 24.0,
    max_clips: Annotated[
        int | None,
        typer.Option(
            help="Largest number of clips in one video. A video that is longer than --frames has several clips: for "
            "12 seconds, a14b needs 3 clips. A model that takes no images has one.",
            show_default="as many as 12 seconds need",
            rich_help_panel=SERVER,
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of a PostgreSQL database for the queue, such as postgresql://USER@HOST/NAME.",
            envvar="WANFAST_DATABASE",
            show_default="SQLite in --data-dir",
            rich_help_panel=SERVER,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="<address>",
            help="Serve on the machines of a Ray cluster: HOST:PORT of its head, or auto for the cluster to which this "
            "machine belongs. Needs --database.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="With --ray: the number of servers. Each server has --num-gpus GPUs of one machine.",
            show_default="as many as the cluster has room for",
            rich_help_panel=SERVER,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the queue and the videos.",
            show_default="server/ in --artifacts-dir",
            rich_help_panel=FILES,
        ),
    ] = None,
) -> None:
    """Keep the models loaded, and make videos that clients request over HTTP.

    Clients of OpenAI's video API can use the server.
    --size and --frames state the largest clip that a client may request. A longer video has up to --max-clips clips.
    The other options of a video are defaults, which a request may override.
    """
    _check_ray(ray, replicas, database, port)
    given = accepted(options.given(context))
    of_open = {name for name in given if name in OF_HANDLE | OF_ALL_VIDEOS}
    artifacts_dir = given.get("artifacts_dir") or default_artifacts_dir()
    settings = ServerSettings(
        host=host,
        port=port,
        data_dir=Path(absolute(str(data_dir or Path(artifacts_dir) / "server"), "--data-dir")),
        database=database,
        api_key_file=Path(absolute(str(api_key_file), "--api-key-file")) if api_key_file else None,
        max_queue=max_queue,
        max_upload_mb=max_upload_mb,
        keep_hours=keep_hours,
        max_clips=max_clips,
    )
    defaults: dict[str, Any] = {name: value for name, value in given.items() if name not in of_open}
    asked = {name: given[name] for name in of_open}
    checked(asked)
    for package in ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client", "python_multipart"):
        if find_spec(package) is None:
            raise ConfigError(f"the server needs {package}: run `{install('serve')}`")
    from wanfast.server.replicas import serve_on
    from wanfast.server.serve import serve as run

    opened = Opened.of(asked)
    if ray is None:
        run(settings, opened, defaults)
    else:
        serve_on(ray, replicas, settings, opened, defaults)


def _check_ray(ray: str | None, replicas: int | None, database: str | None, port: int) -> None:
    """Raises ConfigError for options that exclude or need each other."""
    if ray is None and replicas is not None:
        raise ConfigError("--replicas needs a cluster: add --ray ADDRESS, or drop --replicas")
    if replicas is not None and replicas < 1:
        raise ConfigError(f"--replicas {replicas}: use 1 or more")
    if ray is not None and database is None:
        raise ConfigError(
            "--ray needs --database postgresql://USER@HOST/NAME, because SQLite cannot be shared by several machines"
        )
    if ray is not None and port == 0:
        raise ConfigError("--port 0: Ray Serve cannot choose a port: give a port that is free on the cluster's head")
