"""Tests the rank group of another machine: what it gets and gives are bytes, and it keeps nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Outcome
from tests.media.test_earlier_video import write
from tests.server.running import until
from wanfast.runtime.errors import from_failure
from wanfast.runtime.planning import sidecar
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.request_files import Request
from wanfast.runtime.planning.requests import plan_requests
from wanfast.runtime.processes.remote import RemoteGroup
from wanfast.runtime.store import model_files

VIDEO = {
    "model": "tiny", "device": "cpu", "image": "cat.png", "prompt": "a cat", "size": "64x64", "frames": 5, "steps": 2,
    "seed": 1, "contact_sheet": True,
}  # fmt: skip


def planned(**options: Any) -> Plan:
    (item,) = plan_requests([Request({**VIDEO, **options})], needs_weights=True)
    assert item.plan
    return item.plan


@pytest.fixture
def group(workdir: Path, forked: None) -> Iterator[RemoteGroup]:
    group = RemoteGroup(None)
    yield group
    group.stop()


def test_a_video_comes_as_bytes_and_is_the_one_of_generate(
    group: RemoteGroup, workdir: Path, wanfast: Callable[..., Outcome]
) -> None:
    Image.open("cat.png").transpose(Image.Transpose.ROTATE_180).save("last.png")
    plan = planned(output="remote.mp4", last_image="last.png")
    files = {"--image": workdir / "cat.png", "--last-image": workdir / "last.png"}
    images = {flag: file.read_bytes() for flag, file in files.items()}
    for file in files.values():
        file.unlink()  # as on another machine
    made = group.make(plan.job().to_json(), images)
    assert "error" not in made.result and not made.is_lost
    assert not list(workdir.glob("remote*")) and not list(workdir.glob("artifacts/runs/*/files/*"))
    document = sidecar.moved(made.result, plan.config.output, plan.config.video)
    sidecar.write_made(document, made.files, plan.outputs, overwrite=False)

    for flag, file in files.items():
        file.write_bytes(images[flag])
    words = ["--last-image=last.png"] + [
        f"--{name.replace('_', '-')}={value}" for name, value in VIDEO.items() if value is not True
    ]
    assert wanfast("generate", *words, "--contact-sheet", "--output", "remote.mp4", "--overwrite").exit_code == 0
    alone = json.loads((workdir / "remote.json").read_text())
    assert (workdir / "remote.mp4").read_bytes() == made.files[0]
    assert (workdir / "remote.png").read_bytes() == made.files[1]
    for name in ("output", "output_sha256", "effective", "requested", "weights"):
        if name == "effective":
            alone[name]["output"]["overwrite"] = False
        if name == "requested":
            del alone[name]["overwrite"]
        assert document[name] == alone[name], name
    assert list(document) == list(alone) and document["plan"]["outputs"] == alone["plan"]["outputs"]
    assert document["plan"]["images"] == alone["plan"]["images"] == {flag: str(file) for flag, file in files.items()}


def test_a_continuation_in_several_clips_travels_too(
    group: RemoteGroup, workdir: Path, wanfast: Callable[..., Outcome]
) -> None:
    old = write(workdir / "old.mp4", 64, 48)
    plan = planned(continue_from="old.mp4", image=None, size=None, prompt=["a", "b"], output="remote.mp4")
    content = old.read_bytes()
    old.unlink()
    made = group.make(plan.job().to_json(), {"--continue-from": content})
    assert "error" not in made.result and made.result["plan"]["total_frames"] == 11
    document = sidecar.moved(made.result, plan.config.output, plan.config.video)
    sidecar.write_made(document, made.files, plan.outputs, overwrite=False)
    old.write_bytes(content)
    again = wanfast("generate", "--from", "remote.json", "--output", "again.mp4", "--json").document
    assert again["output_sha256"] == document["output_sha256"]


def test_the_models_stay_loaded_and_the_progress_is_told(group: RemoteGroup, workdir: Path) -> None:
    images = {"--image": (workdir / "cat.png").read_bytes()}
    first, second = (group.make(planned(seed=seed).job().to_json(), images) for seed in (1, 2))
    assert "vae" in first.result["loading"] and second.result["loading"] == {}
    assert group.state()[1:] == (2, 2)
    group.close()
    assert not list(workdir.glob("artifacts/runs/*/files"))


def test_a_line_that_fails_by_itself_is_not_lost(group: RemoteGroup, workdir: Path) -> None:
    made = group.make(planned().job().to_json(), {"--image": b"another picture"})
    assert made.result["exit_code"] == 2 and not made.is_lost and made.files == ()


def test_a_line_whose_models_do_not_load_is_lost_by_this_machine(group: RemoteGroup, workdir: Path) -> None:
    shutil.copytree(model_files.TINY, workdir / "copy")
    plan = planned(model="copy")
    shutil.rmtree(workdir / "copy/vae")
    made = group.make(plan.job().to_json(), {"--image": (workdir / "cat.png").read_bytes()})
    assert made.result["exit_code"] == 3 and made.is_lost


def test_a_line_whose_rank_dies_is_lost_and_the_next_one_is_made(group: RemoteGroup, workdir: Path) -> None:
    images = {"--image": (workdir / "cat.png").read_bytes()}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(group.make, planned(steps=1000).job().to_json(), images)
        until(lambda: group.state()[1] > 1)
        (pid,) = workdir.glob("artifacts/runs/*/ranks/*/pid")
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert made.result().result["exit_code"] == 5 and made.result().is_lost
    assert not group.make(planned().job().to_json(), images).is_lost


def test_a_full_disk_costs_the_machine_the_line(
    group: RemoteGroup, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    made = group.make(plan.job().to_json(), {"--image": b""})
    assert made.is_lost and "No space left on device" in made.result["error"]


def test_a_stopped_group_makes_nothing(group: RemoteGroup) -> None:
    group.stop()
    assert group.make(planned().job().to_json(), {"--image": b""}).result["exit_code"] == 5


def test_weights_are_compared_with_those_of_the_command(workdir: Path) -> None:
    document = planned().job().to_json()
    fingerprints = model_files.locate("tiny", "artifacts").fingerprints
    group = RemoteGroup(None)
    assert group.check([(document, fingerprints)]) is None
    error = from_failure(group.check([(document, {**fingerprints, "vae": "other"})]) or {})
    assert "--model tiny: the weights on a machine of the cluster differ" in str(error) and error.exit_code == 2


def test_the_threads_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it
    RemoteGroup("3")
    assert os.environ["OMP_NUM_THREADS"] == "3"
    RemoteGroup(None)
    assert "OMP_NUM_THREADS" not in os.environ
