"""Tests that a path which no file can have gets one line that names the option, at every option that takes a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer.main

from tests.conftest import Outcome
from wanfast.cli import app
from wanfast.commands import bench
from wanfast.runtime.config import OPTIONS
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.processes.handle import Video

Wanfast = Callable[..., Outcome]
TINY = ("--model", "tiny", "--device", "cpu")
MAKE = (*TINY, "--image", "cat.png", "--prompt", "a cat")
# Options with which a command reads each path, and does nothing else.
REST: dict[str, tuple[str, ...]] = {
    "generate": (*MAKE, "--dry-run"),
    "download": (),
    "quantize": ("--scheme", "bf16", *TINY),
    "calibrate-magcache": TINY,
    "calibrate-attention": TINY,
    "warmup": TINY,
    "bench": (*TINY, "--recipes", "exact"),
    "serve": (*TINY, "--port", "0"),
    "doctor": ("--model", "tiny"),
}
PATHS = {"long": "a" * 300, "NUL": "a\0b", "no folder": "cat.png/a"}
INSTEAD_OF = {  # an option that stands in REST, or that excludes one of these
    "--continue-from": ("--image", "cat.png"),
    "--prompt-file": ("--prompt", "a cat"),
    "--model": TINY[:2],
    "--artifacts-dir": ("--dry-run",),  # which writes nothing there
}
# The queue of a server lies in the artifacts folder by default.
ALSO = {("serve", "--artifacts-dir"): "--data-dir"}


def takes_paths(parameter: Any) -> bool:
    annotation = parameter.type_descriptor.annotation
    return Path in (annotation, *get_args(annotation)) or (
        parameter.name in OPTIONS and OPTIONS[parameter.name].option.path
    )


def path_options() -> Iterator[tuple[str, str]]:
    """Yields (command, option) for each option of a path."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        yield from ((name, each.opts[0]) for each in command.params if takes_paths(each))


@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [
        (command, option, kind)
        for command, option in path_options()
        for kind in PATHS
        if (command, option, kind) != ("download", "--artifacts-dir", "no folder")  # it asks the hub first
    ],
)
def test_a_path_that_no_file_can_have(wanfast: Wanfast, command: str, option: str, kind: str) -> None:
    rest = [word for word in REST[command] if word not in INSTEAD_OF.get(option, ())]
    outcome = wanfast(command, *rest, option, PATHS[kind])
    if command == "doctor" and outcome.exit_code == 0:  # it reports what is missing
        return
    assert outcome.exit_code in (2, 3), (outcome.out, outcome.err)
    refused(outcome, option, ALSO.get((command, option), option))


def refused(outcome: Outcome, *options: str) -> None:
    error = outcome.err.strip().splitlines()[-1]
    assert error.startswith("error: ") and any(option in error for option in options)
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "options",
    [
        ("--skip-existing", "--output", "a" * 300 + ".mp4"),
        *(
            ("--artifacts-dir", "a" * 300, *others)
            for others in (
                ("--magcache", "artifact"),
                ("--attention", "sparse", "--attention-plan", "artifact"),
                ("--quantize", "int8-dynamic"),
                ("--recipe", "lightning-4"),
                ("--model", "a14b"),
            )
        ),
    ],
)
def test_a_name_that_is_too_long_is_no_traceback(wanfast: Wanfast, options: tuple[str, ...]) -> None:
    outcome = wanfast("generate", *MAKE, *options, "--dry-run")
    assert outcome.exit_code == 2
    refused(outcome, "--output", "--artifacts-dir")


def test_a_report_s_folder_is_checked_before_hours_of_work(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench, "measure", measure)
    outcome = wanfast("bench", *REST["bench"], "--output", "cat.png")
    assert outcome.exit_code == 2
    refused(outcome, "--output")


def test_save_refuses_such_a_name() -> None:
    video = Video(
        np.zeros((1, 16, 16, 3), np.uint8),
        {"effective": {"video": dict.fromkeys(("image", "continue_from", "last_image"))}},
    )
    with pytest.raises(ConfigError, match=r"save .*: cannot be written"):
        video.save("a" * 300 + ".mp4")
