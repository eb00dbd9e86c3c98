"""Serves on the machines of a Ray cluster: Ray Serve runs the app in replicas, each with ranks on one machine.

Each replica has a whole server except HTTP: the app, the worker and the ranks. Ray Serve receives the HTTP requests and
passes each one to a replica. The replicas share the queue in PostgreSQL and the folder of the videos, so that any
replica answers for every video. If a replica is lost while it makes a video, another replica makes this video when the
lease ends, and Ray Serve starts the lost replica again.
This module does not import torch, and imports Ray only when it connects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, TypeVar

from wanfast.runtime.errors import ConfigError, RankFailedError, foreign
from wanfast.runtime.machine.signals import stopped_by_signals
from wanfast.runtime.processes.cluster import actors_environment, connected, needs_of, require_room, room_for
from wanfast.runtime.processes.handle import Opened
from wanfast.runtime.store.artifacts import note
from wanfast.server.app import create_app
from wanfast.server.checks import Served
from wanfast.server.files import Files
from wanfast.server.keys import Keys
from wanfast.server.serve import address_of, keys_of, parts_of, print_ready, warm_up_of
from wanfast.server.settings import ServerSettings
from wanfast.server.store import Store

_APP = "wanfast"
_LOOK_S = 0.5  # between two looks at the replicas
_ANSWER_S = 30.0  # the cluster's head answers within this time
_MOST_REQUESTS = 1000  # at once of a replica, because a request may wait for its video
_STOPPING_S = 120.0  # for a step to end, and a finished video to be written
_LOADS = 3  # of a replica, before the command gives up
T = TypeVar("T")


class _LostClusterError(RankFailedError):
    """This error means that the cluster does not answer any more."""


class Replica:
    """This class is one server, without HTTP of its own: Ray Serve passes requests to this server's app."""

    def __init__(
        self, settings: ServerSettings, keys: Keys, asked: dict[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """Loads the models on this machine, and returns when they are loaded. Raises WanFastError.

        `asked`: the options of the handle. The replica plans them again, because the plan depends on the memory of the
        replica's machine.
        """
        self._error: BaseException | None = None
        self._owned = ExitStack()
        self._parts = self._owned.enter_context(parts_of(settings, keys, Opened.of(asked), defaults))
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()
        while not self._parts.worker.is_ready and self._thread.is_alive():
            self._thread.join(_LOOK_S / 5)
        if self._error is not None:
            self._owned.close()
            raise self._error

    def __serve_build_asgi_app__(self) -> Any:
        """Returns the app; Ray Serve calls this method by its name."""
        return create_app(self._parts)

    def check_health(self) -> None:
        """Raises an exception if the worker has ended, so that Ray Serve starts another replica."""
        if not self._thread.is_alive():
            raise self._error or RuntimeError("the worker has ended")

    def __del__(self) -> None:
        """Stops the current video at its next step, queues its job again, and ends the ranks. Ray Serve calls this."""
        owned = self.__dict__.get("_owned")
        if owned is not None and "_thread" in self.__dict__:
            self._parts.worker.stop()
            self._thread.join()
            owned.close()

    def _work(self) -> None:
        try:
            self._parts.worker.run()
        except BaseException as error:  # noqa: BLE001 - the health check raises it
            self._error = error


def serve_on(
    address: str, replicas: int | None, settings: ServerSettings, opened: Opened, defaults: Mapping[str, Any]
) -> None:
    """Serves on a Ray cluster until SIGTERM or SIGINT; then all replicas end. Raises WanFastError.

    `replicas`: the number of replicas, or None for as many as the cluster has room for. A second signal ends this
    process at once. Then the replicas that had no time to end continue to run.
    """
    keys, files, ranks = keys_of(settings), Files(settings.data_dir), opened.placed.config.ranks
    warm_up_of(opened, Served.of(opened, defaults, settings.max_clips), files)  # refuses what no replica could serve
    Store(settings.database_url).close()
    asked = {**opened.asked, "device": ranks.device, "num_gpus": ranks.num_gpus}
    asked["artifacts_dir"] = opened.placed.config.models.artifacts_dir
    stopped = threading.Event()
    with connected(address) as ray, stopped_by_signals(stopped.set, lambda: _note_left("the command was ended")):
        require_room(ray, address, ranks)
        number = replicas or room_for(ray, ranks)
        if number > room_for(ray, ranks):
            room = room_for(ray, ranks)
            raise ConfigError(
                f"--replicas {number}: --ray {address} has room for {room} replicas: use {room}, or more machines"
            )
        from ray import serve

        _start(serve, settings)
        try:
            deployment = serve.deployment(
                serve.ingress()(Replica),
                name=_APP,
                num_replicas=number,
                placement_group_bundles=[{name: float(amount) for name, amount in needs_of(ranks).items()}],
                placement_group_strategy="STRICT_PACK",
                ray_actor_options={
                    **{f"num_{name.lower()}s": amount for name, amount in needs_of(ranks).items()},
                    "runtime_env": actors_environment(),
                },
                max_ongoing_requests=_MOST_REQUESTS,
                graceful_shutdown_timeout_s=_STOPPING_S,
                max_constructor_retry_count=_LOADS,
            )
            target = serve.RunTarget(deployment.bind(settings, keys, asked, dict(defaults)), name=_APP)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            _watch(serve, settings, stopped)
        except _LostClusterError:
            raise  # there is nothing that could be ended
        except BaseException:
            _end(serve)
            raise
        _end(serve)


def _start(serve: Any, settings: ServerSettings) -> None:
    """Starts Ray Serve, whose HTTP is on the cluster's head. Raises ConfigError."""
    found = serve.status()
    if found.proxies or found.applications:
        raise ConfigError(
            "--ray: Ray Serve runs on this cluster already: end it by `serve shutdown`, or use another cluster"
        )
    with foreign(f"--host {settings.host} --port {settings.port}", "use an address and a port of the cluster's head"):
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})


def _watch(serve: Any, settings: ServerSettings, stopped: threading.Event) -> None:
    """Waits for a signal, and prints the address when the replicas have their models. Raises RankFailedError."""
    status, was_ready = "", False
    while not stopped.wait(_LOOK_S):
        found = _application(serve)
        if found.status == status:
            continue
        status = found.status
        if status == "DEPLOY_FAILED":
            lines = [line.strip() for line in found.deployments[_APP].message.splitlines() if line.strip()]
            raise RankFailedError(f"--ray: the replicas cannot start ({' '.join(lines)[-400:]}): see `ray logs`")
        if status == "RUNNING" and not was_ready:
            was_ready = True
            print_ready(address_of(settings.host, settings.port))
        elif was_ready:
            note(f"--ray: the replicas are {status.lower()}")


def _application(serve: Any) -> Any:
    """Returns the state of the app. Raises RankFailedError if the app was deleted or the cluster does not answer."""
    try:
        found = _answered(serve.status, _ANSWER_S).applications.get(_APP)
    except Exception as error:  # noqa: BLE001 - Ray has many, and all of them mean that the cluster does not answer
        raise _LostClusterError(
            f"--ray: the cluster does not answer ({_one_line(error)}): start a cluster, then run this command again"
        ) from None
    if found is None or found.status == "DELETING":
        raise RankFailedError(
            f"--ray: somebody ended the application {_APP} of Ray Serve: run this command again; the queue is kept"
        )
    return found


def _end(serve: Any) -> None:
    """Ends all replicas. If the cluster does not answer, a note says so, and an earlier error stays the error."""
    try:
        _answered(serve.shutdown, _STOPPING_S + _ANSWER_S)
    except Exception as error:  # noqa: BLE001 - as above
        _note_left(_one_line(error))


def _note_left(why: str) -> None:
    note(f"--ray: the replicas may still run ({why}): run `serve shutdown` on the cluster")


def _answered(call: Callable[[], T], seconds: float) -> T:
    """Returns the result of a call of Ray, which waits for ever if the cluster's head is lost. Raises TimeoutError."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # daemon, so that this process can end
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
