"""Defines shared fixtures: a picture, a working folder, and the command line run in this process."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image

from tests.counted_reads import counting
from tests.forked import ForkedPopen
from tests.small_model import TEXT_SPEC, write_small_model
from wanfast.cli import main
from wanfast.runtime.machine import host
from wanfast.runtime.machine.gpus import Gpu
from wanfast.runtime.planning import placement
from wanfast.runtime.weights import checkpoint

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the suite runs as many processes as there are cores
typer.main.get_command = functools.cache(typer.main.get_command)  # builds the options of the command line once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    _exclude_imports()
    gc.enable()
    atexit.register(gc.freeze)  # else the interpreter, before it ends, searches all of them for garbage


def pytest_runtest_logfinish() -> None:
    """Looks for what a test imported, such as the compiler."""
    if len(sys.modules) > _known_modules + 20:
        _exclude_imports()


_known_modules = 0  # when imports were last excluded


def _exclude_imports() -> None:
    """Excludes imported objects from garbage collection: each collection took up to half a second over them."""
    global _known_modules
    gc.collect()
    gc.freeze()
    _known_modules = len(sys.modules)


@dataclass(frozen=True)
class Outcome:
    """Holds what a command line returned and printed."""

    exit_code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Returns the JSON of the last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes into an empty folder with a picture `cat.png`; artifacts are stored inside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANFAST_ARTIFACTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub-cache"))  # the machine's own may hold weights
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    picture.save("cat.png")
    return tmp_path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def small_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a small model that makes videos from text alone."""
    return write_small_model(tmp_path_factory.mktemp("text_model"), TEXT_SPEC)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by the bytes of every piece that this process reads from safetensors files."""
    found: list[int] = []
    monkeypatch.setattr(checkpoint.SafetensorsReader, "rows", counting(found))
    return found


@pytest.fixture
def wanfast(workdir: Path, capsys: pytest.CaptureFixture[str], forked: None) -> Callable[..., Outcome]:
    """Returns `wanfast(*arguments)`, which runs the command line in the working folder; its ranks are forks."""

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list of the figures of matplotlib that are saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    savefig = Figure.savefig

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a command start its processes, its ranks above all, as forks of this one."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Returns `machine(count, gigabytes)`, which simulates GPUs with this much free memory.

    The host has enough memory, or `host_gb`.
    """

    def set_up(count: int, gigabytes: float, host_gb: float = 500) -> None:
        monkeypatch.setattr(host, "available_host_bytes", lambda: int(host_gb * 1e9))
        free = int(gigabytes * 1e9)
        found = [Gpu("NVIDIA H100", free, free, "580", (9, 0), 18)] * count
        monkeypatch.setattr(placement.gpus, "visible_gpus", lambda: found)

    return set_up
