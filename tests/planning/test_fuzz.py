"""Damages sidecars, lists and prompt files: each is planned, or refused in one line; a bad line costs only itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.damage import VALUES, changed, counts, damage, damaged
from wanfast.runtime.config import OPTIONS
from wanfast.runtime.errors import WanFastError
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.request_files import read_requests
from wanfast.runtime.planning.requests import Planned, plan_requests

TYPED = {"model": "tiny", "image": "cat.png", "prompt": "a cat", "device": "cpu", "size": "64x64", "frames": 5}


@pytest.fixture(autouse=True)
def one_list(workdir: Path) -> Iterator[None]:
    """Lets the tokenizer and the GPUs be asked once, as a list does."""
    with asked_once():
        yield


def planned(typed: dict[str, Any], *files: Path | None) -> list[Planned]:
    before = sorted(Path.cwd().iterdir())
    found = plan_requests(read_requests(typed, *files), needs_weights=False)
    for item in found:
        if item.plan:
            json.dumps(sidecar.planned(item.plan))
        else:
            error = json.dumps(item.outcome())
            assert "Traceback" not in error and len(error) < 5000
    assert sorted(Path.cwd().iterdir()) == before
    return found


@counts(200)
def test_sidecars(workdir: Path, examples: int) -> None:
    (plan,) = [item.plan for item in planned(TYPED, None, None, None)]
    assert plan is not None
    document = json.loads(json.dumps(sidecar.planned(plan) | {"weights": {}}))
    file = workdir / "earlier.json"

    def check(new: object) -> None:
        file.write_text(json.dumps(new))
        planned({}, None, file, None)

    damage(changed({name: document[name] for name in ("effective", "weights")}), check, examples)


@counts(300)
def test_bytes_of_a_sidecar(workdir: Path, examples: int) -> None:
    (plan,) = [item.plan for item in planned(TYPED, None, None, None)]
    assert plan is not None
    content = json.dumps(sidecar.planned(plan) | {"weights": {}}).encode()
    file = workdir / "earlier.json"

    def check(new: bytes) -> None:
        file.write_bytes(new)
        planned({}, None, file, None)

    damage(damaged(content), check, examples)


LINES = st.lists(st.dictionaries(st.sampled_from([*OPTIONS, "unknown"]), VALUES, max_size=3), min_size=1, max_size=3)


@counts(125)
def test_lines_of_a_list(workdir: Path, examples: int) -> None:
    """A good line beside them is planned all the same."""
    file = workdir / "jobs.jsonl"

    def check(lines: list[dict[str, Any]]) -> None:
        file.write_text("\n".join(map(json.dumps, [*lines, {"output": "the-good-one.mp4"}])))
        assert planned(TYPED, None, None, file)[-1].plan is not None

    damage(LINES, check, examples)


@counts(250)
def test_bytes_of_a_list(workdir: Path, examples: int) -> None:
    content = b'# two videos\n{"prompt": "a cat", "seed": 3}\n\n{"image": "cat.png", "steps": 7, "shift": 3.0}\n'
    file = workdir / "jobs.jsonl"

    def check(new: bytes) -> None:
        file.write_bytes(new)
        planned(TYPED, None, None, file)

    damage(damaged(content), check, examples)


@counts(250)
def test_prompt_files(workdir: Path, examples: int) -> None:
    file = workdir / "prompt.txt"

    def check(new: bytes) -> None:
        file.write_bytes(new)
        planned({name: value for name, value in TYPED.items() if name != "prompt"}, file, None, None)

    damage(
        st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode("utf-8"))), check, examples
    )


@counts(250)
def test_options_of_a_handle(workdir: Path, examples: int) -> None:
    """Values of any type reach the config from Python."""

    def check(options: dict[str, Any]) -> None:
        planned(TYPED | options, None, None, None)

    damage(st.dictionaries(st.sampled_from(list(OPTIONS)), VALUES, max_size=3), check, examples)


def test_the_good_inputs_are_planned(workdir: Path) -> None:
    """Otherwise nothing above would reach the planning."""
    (item,) = planned(TYPED, None, None, None)
    assert item.plan is not None
    with pytest.raises(WanFastError):
        planned(TYPED | {"steps": "many"}, None, None, None)
