"""Makes the videos of a list on the machines of a Ray cluster.

Each actor has one rank group, and makes one line at a time. It keeps its ranks and their models from line to line. If a
machine is lost, or its ranks or models fail, another machine makes the line. An actor returns a video's files as bytes,
and the command's process writes the files.
This module does not import torch, and imports Ray only when it connects.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, Any

from wanfast.runtime.config import RanksConfig
from wanfast.runtime.errors import ConfigError, RankFailedError, WanFastError, failure, foreign, from_failure
from wanfast.runtime.machine.host import THREADS
from wanfast.runtime.machine.packages import install
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.progress import ProgressFn, ResultFn
from wanfast.runtime.processes.launch import child_environment
from wanfast.runtime.processes.lines import MOST_TRIES, Lines
from wanfast.runtime.processes.remote import Delivered, RemoteGroup
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import note
from wanfast.runtime.store.json_files import Document

_ADDRESS = re.compile(r"auto|(?P<host>[^\s:/]+):(?P<port>\d{1,5})")
_FIX = "start a cluster by `ray start`, with this machine in it, and give HOST:PORT of its head"
_ANSWER_S = 5.0  # the head of a cluster accepts a connection within this time
_PAUSE_S = 0.5  # between two looks at the machines, and between two reports of progress
_SOON_S = 20.0  # a machine starts a rank group within this time, unless its GPUs are in use
_GRACE_S = 10.0  # for the actors to end their ranks
_MOST_FAILURES = 2  # one after the other of one rank group, which then gets no more lines if there are others


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connects this process to the Ray cluster at `address`, and yields the module `ray`.

    `address`: HOST:PORT of the cluster's head, or "auto". Raises ConfigError if Ray is not installed or the cluster
    cannot be reached.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"--ray needs the package ray: run `{install('ray')}`")
    _reach(address)
    import ray

    environment = actors_environment()
    with _silent_threads(), _own_sigterm() as restore:
        with foreign(f"--ray {address}", _FIX):
            ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        try:
            restore()
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises ConfigError if nothing listens at the address, for which Ray itself would wait for minutes."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"--ray {address!r:.60} is neither HOST:PORT nor auto: give HOST:PORT of the cluster's head")
    if found["host"] is None:
        return
    with foreign(f"--ray {address}", _FIX), socket.create_connection((found["host"], int(found["port"])), _ANSWER_S):
        pass


def actors_environment() -> Document:
    """Returns the `runtime_env` with which Ray starts the actors; it sets PYTHONPATH, or it is empty.

    If wanfast runs from a checkout, the actors import wanfast from the same path. If this process has a PYTHONPATH, the
    actors search its folders too.
    """
    path = child_environment().get("PYTHONPATH")
    return {"env_vars": {"PYTHONPATH": path}} if path else {}


class _Filter:
    """This class is a stream that drops what Ray's threads print, such as the log of a machine that died."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        is_of_ray = threading.current_thread().name.startswith("ray_")
        return len(text) if is_of_ray else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _silent_threads() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Filter(sys.stdout), _Filter(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def _own_sigterm() -> Iterator[Callable[[], object]]:
    """Keeps this program's answer to SIGTERM, and its exit code: Ray sets its own, and forgets the code.

    The block must call the yielded function after it connected.
    """
    handler, came = signal.getsignal(signal.SIGTERM), []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        sys.exit(128 + number)

    try:
        yield lambda: signal.signal(signal.SIGTERM, stop)
    except SystemExit:
        if came:
            sys.exit(128 + came[0])
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@dataclass(eq=False)
class _Group:
    """This class is this process's side of an actor."""

    actor: Any
    started: float
    answer: Any = None  # the reference of what the actor does now: it checks its weights, or makes a line
    state: Any = None  # the reference of a question for the progress
    asked: float = 0.0
    machine: str = ""  # known when the actor has answered once
    line: int | None = None
    loaded: str | None = None
    failures: int = 0  # one after the other
    is_barred: bool = False  # gets no more lines; it stays, so that no other group is started in its place


class _Actor(RemoteGroup):
    """This class is what runs on a machine of the cluster."""

    def start(self, jobs: Any) -> tuple[str, Document | None]:
        """Compares this machine's weights with the weights on the machine where the command runs.

        Returns (this machine's name in the cluster, None) if the weights are equal. Otherwise, an error as a JSON
        document takes the place of None. `jobs`: see `RemoteGroup.check`.
        """
        import ray

        node = ray.get_runtime_context().get_node_id()
        return f"{socket.gethostname()} (node {node[:8]})", self.check(jobs)


def require_one_group(plan: Plan) -> None:
    """Raises ConfigError if the options give several rank groups, or one rank group on several machines."""
    ranks = plan.config.ranks
    if ranks.nnodes > 1:
        raise ConfigError(
            "--ray and --nnodes exclude each other: drop --nnodes to make each video on one machine, or drop --ray to "
            "make each video on several machines"
        )
    if plan.mesh.replica > 1:
        raise ConfigError(
            f"--num-gpus {ranks.num_gpus} gives {plan.mesh.replica} rank groups, but with --ray, --num-gpus is the "
            f"number of ranks of one video: use --num-gpus {plan.mesh.group_size}"
        )


def needs_of(ranks: RanksConfig) -> dict[str, int]:
    """Returns {"CPU": cores, "GPU": GPUs}: what Ray must reserve on a machine for the ranks of one video.

    The result has no "GPU" if the ranks run on the CPU.
    """
    return {"CPU": ranks.num_gpus} if ranks.device == "cpu" else {"CPU": 1, "GPU": ranks.num_gpus}


def room_for(ray: Any, ranks: RanksConfig) -> int:
    """Returns how many rank groups all living machines together can hold, if they run nothing else.

    `ranks`: the device and the number of ranks of each group.
    """
    needs = needs_of(ranks).items()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(machine.get(name, 0) // number for name, number in needs)) for machine in machines)


def require_room(ray: Any, address: str, ranks: RanksConfig) -> None:
    """Raises ConfigError if no machine of the cluster has enough GPUs or CPU cores for the ranks of one video.

    `address`: the address of the cluster, for the message of the error.
    """
    if not room_for(ray, ranks):
        kind = "CPU cores" if ranks.device == "cpu" else "GPUs"
        raise ConfigError(
            f"--num-gpus {ranks.num_gpus}: no machine of --ray {address} has {ranks.num_gpus} {kind}: use a smaller "
            "number, or a cluster of larger machines"
        )


class RayList:
    """This class makes the videos of one list on a Ray cluster. Only one thread may use an object of this class."""

    def __init__(self, ray: Any, address: str, plans: Sequence[Plan], documents: Sequence[Document]) -> None:
        """`documents`: the job of each plan as JSON. Raises ConfigError if no machine can hold the ranks of a video."""
        self._ray, self._address, self._plans, self._documents = ray, address, plans, documents
        self._ranks: RanksConfig = plans[0].config.ranks
        self._lines = Lines([json.dumps(document["effective"]["models"]) for document in documents])
        self._groups: list[_Group] = []
        self._results: dict[int, Document] = {}
        self._failed_starts = 0  # one after the other
        self._error: WanFastError | None = None  # why the last group was lost
        self._has_waited = False
        require_room(ray, address, self._ranks)
        self._weights = ray.put(_weights(plans, documents))

    def run(self, on_result: ResultFn, on_progress: ProgressFn) -> list[Document]:
        """Makes all lines, and returns one result for each line, in order.

        `on_result` gets a line's result as soon as the line is done or has failed. When this method ends, also by an
        exception, all actors have ended.
        """
        try:
            while len(self._results) < len(self._plans):
                before = set(self._results)
                self._start_missing()
                self._give_up_without_machines()
                self._give_lines()
                self._listen(on_progress)
                for line in sorted(self._results.keys() - before):
                    on_result(line, self._results[line])
            self._end("close")
        finally:
            self._end("stop")
        return [self._results[line] for line in range(len(self._plans))]

    def _start_missing(self) -> None:
        """Starts as many actors as the machines have room for, and the list has lines."""
        room = room_for(self._ray, self._ranks)
        wanted = len(self._lines.waiting) + sum(group.line is not None for group in self._groups)
        barred = sum(group.is_barred for group in self._groups)
        while len(self._groups) < min(room, wanted + barred) and self._failed_starts < MOST_TRIES:
            needs = {f"num_{name.lower()}s": number for name, number in needs_of(self._ranks).items()}
            kind = self._ray.remote(_Actor).options(max_concurrency=3, **needs)  # for `make`, `state` and `stop`
            group = _Group(kind.remote(os.environ.get(THREADS)), time.monotonic())
            group.answer = group.actor.start.remote(self._weights)
            self._groups.append(group)

    def _give_lines(self) -> None:
        """Gives each idle group a line."""
        usable = {group.machine for group in self._groups if group.machine and not group.is_barred}
        for group in self._groups:
            if not group.machine or group.is_barred or group.answer is not None:
                continue
            line = self._lines.take(group.machine, group.loaded, usable)
            if line is None:
                continue
            images: dict[str, bytes] = {}
            try:
                for flag, path in self._plans[line].config.video.images.items():
                    with foreign(f"{flag} {path}", "restore the image"):
                        images[flag] = Path(path).read_bytes()
            except ConfigError as error:
                self._results[line] = failure(error)
                continue
            group.line, group.loaded = line, self._lines.models(line)
            group.answer = group.actor.make.remote(self._documents[line], images)

    def _listen(self, on_progress: ProgressFn) -> None:
        """Waits a little for answers of the groups, and handles those that came."""
        for group in self._groups:
            if group.line is not None and group.state is None and time.monotonic() - group.asked >= _PAUSE_S:
                group.state, group.asked = group.actor.state.remote(), time.monotonic()
        of_group = {group.answer: group for group in self._groups if group.answer is not None}
        states = {group.state: group for group in self._groups if group.state is not None}
        came, _ = self._ray.wait([*of_group, *states], timeout=_PAUSE_S) if of_group else ([], [])
        for answer in came:
            if answer in states:
                self._progressed(states[answer], on_progress)
            else:
                self._answered(of_group[answer])

    def _progressed(self, group: _Group, on_progress: ProgressFn) -> None:
        with suppress(self._ray.exceptions.RayError):  # the answer of the line itself tells what happened
            stage, done, total = self._ray.get(group.state)
            if group.line is not None and stage:
                on_progress(group.line, stage, done, total)
        group.state = None

    def _answered(self, group: _Group) -> None:
        """Handles the end of what a group did. Raises an exception that is a bug of the actor's code."""
        answer, group.answer = group.answer, None
        try:
            found = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            self._lost(group, error)
            return
        if group.line is None:
            self._started(group, *found)
        else:
            self._made(group, found)

    def _started(self, group: _Group, machine: str, error: Document | None) -> None:
        group.machine, self._failed_starts = machine, 0
        if error is not None:
            note(f"--ray: {machine} gets no line of --jobs: {error['error']}")
            group.is_barred, self._error = True, from_failure(error)

    def _made(self, group: _Group, made: Delivered) -> None:
        line, group.line = group.line, None
        assert line is not None
        if not made.is_lost:
            group.failures = 0
            self._results[line] = self._written(line, made)
            return
        group.failures += 1
        self._error = from_failure(made.result)
        if not self._lines.lose(line, group.machine):
            self._results[line] = made.result
        elif group.failures >= _MOST_FAILURES and any(not other.is_barred for other in self._groups if other != group):
            note(f"--ray: {group.machine} gets no more lines of --jobs: {made.result['error']}")
            group.is_barred = True

    def _written(self, line: int, made: Delivered) -> Document:
        """Writes the files of a video where the command asked for them; returns its document, or its error."""
        if "error" in made.result:
            return made.result
        config = self._plans[line].config
        document = sidecar.moved(made.result, config.output, config.video)
        try:
            sidecar.write_made(document, made.files, config.output.paths, overwrite=config.output.overwrite)
        except WanFastError as error:
            return failure(error)
        return document

    def _lost(self, group: _Group, error: Exception) -> None:
        """Removes a group whose actor or machine died; its line waits for another one."""
        self._groups.remove(group)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(group.actor)  # it may only have been out of reach
        reason = " ".join(str(error).split())
        if group.line is None:
            self._failed_starts += 1
            fix = "install the same wanfast, Python and Ray on all machines"
            self._error = RankFailedError(f"--ray: a machine could not start a rank group ({reason:.300}): {fix}")
            return
        self._error = RankFailedError(
            f"--ray: {group.machine} was lost ({type(error).__name__}): run this command again with --skip-existing"
        )
        note(
            f"--ray: {group.machine} was lost; its line of --jobs waits for another machine, and gets at most "
            f"{MOST_TRIES} tries in all"
        )
        if not self._lines.lose(group.line, group.machine):
            message = f"{MOST_TRIES} tries to make this line failed; in the last one, {group.machine} was lost"
            self._results[group.line] = failure(RankFailedError(message))

    def _give_up_without_machines(self) -> None:
        """Fails the lines that wait if no group is left that can make them."""
        if any(not group.is_barred for group in self._groups):
            self._note_waiting()
            return
        error = self._error or RankFailedError(
            f"--ray {self._address}: no machine is left: start the machines again, and run this command again with "
            "--skip-existing"
        )
        self._results |= {line: failure(error) for line in self._lines.drop()}

    def _note_waiting(self) -> None:
        late = [group for group in self._groups if not group.machine and time.monotonic() - group.started > _SOON_S]
        if len(late) == len(self._groups) and not self._has_waited:
            self._has_waited = True
            note("--ray: this run waits until the cluster has free GPUs, or until machines have hashed their weights")

    def _end(self, way: str) -> None:
        """Lets the actors end their ranks by the method `way`, then ends the actors."""
        groups, self._groups = self._groups, []
        answers = [getattr(group.actor, way).remote() for group in groups if group.machine]
        if answers:
            self._ray.wait(answers, num_returns=len(answers), timeout=_GRACE_S)
        for group in groups:
            self._ray.kill(group.actor)


def _weights(plans: Sequence[Plan], documents: Sequence[Document]) -> list[tuple[Document, dict[str, str]]]:
    """Returns, for each model of a list, one of its jobs and the fingerprints of its weights on this machine."""
    chosen = {plan.config.models: document for plan, document in zip(plans, documents, strict=True)}
    return [(document, model_files.locate_for(models).fingerprints) for models, document in chosen.items()]
