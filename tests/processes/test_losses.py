"""Tests that a list loses only its bad lines on several ranks, which are real processes over gloo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome
from tests.processes.test_launch import SMALL, Start, start, with_fault
from wanfast.runtime.engine import session
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.job import Job
from wanfast.runtime.processes import pace, worker
from wanfast.runtime.store.model_files import TINY, ModelFiles

__all__ = ["start"]

# On rank 1, in the second step, by the prompt of the line.
FAULTS = """
import os, signal, sys, time
import torch
from wanfast.runtime.engine import session
make = session.Session.make

def fail(prompt):
    if "memory" in prompt:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if "killed" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" in prompt:
        time.sleep(1000)
    if "disk" in prompt:
        with open("full/filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

def faulty(self, job, on_step, *others, **named):
    def stepped(done, expert):
        if done == 1:
            fail(job.config.video.prompt)
        on_step(done, expert)

    return make(self, job, stepped, *others, **named)

session.Session.make = faulty
load = session.load_models

def faulty_load(files, *others):
    if files.root.name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return load(files, *others)

session.load_models = faulty_load
"""


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[bool]:
    """Mounts a disk of 8 MB at `full`, and yields whether it is one."""
    (workdir / "full").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(workdir / "full")]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield mounted
    if mounted:
        subprocess.run(["umount", "--lazy", workdir / "full"], check=True)


def write_model_with_nan(folder: Path) -> None:
    shutil.copytree(TINY, folder)
    (file,) = (folder / "transformer_2").glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.1.attn1.to_q.weight"].view(-1)[5] = torch.nan
    save_file(tensors, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, id="one group of two ranks"),
        pytest.param(4, id="two groups of two ranks", marks=pytest.mark.long),
    ],
)
def test_each_bad_line_has_its_own_reason_and_the_others_are_made(
    start: Start, workdir: Path, small_disk: bool, ranks: int, subtests: pytest.Subtests
) -> None:
    bad: dict[int, tuple[dict[str, str], str]] = {
        2: ({"prompt": "memory runs out"}, "a rank ran out of memory"),
        4: ({"prompt": "a rank is killed"}, "rank 1 was killed by SIGKILL"),
        6: ({"prompt": "a rank hangs"}, "waited --rank-timeout 3 s for rank 1, which hangs"),
        8: ({"image": "damaged.png"}, "damaged.png: is truncated or damaged"),
        10: ({"model": "nan"}, "blocks.1.attn1.to_q.weight"),
    }
    if small_disk:
        bad[11] = ({"prompt": "the disk is full", "output": "full/11.mp4"}, "No space left on device")
    (workdir / "damaged.png").write_bytes((workdir / "cat.png").read_bytes()[:100])
    write_model_with_nan(workdir / "nan")
    lines = [{"output": f"{line}.mp4", "steps": 3} | bad.get(line, ({}, ""))[0] for line in range(1, 13)]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mesh = ("--num-gpus", str(ranks), "--cfg-parallel", "2", "--ulysses", "1", "--rank-timeout", "3")
    environment = with_fault(workdir, FAULTS, rank=1, replica=None)
    run = start(*SMALL, *mesh, "--jobs", "jobs.jsonl", "--json", environment=environment)
    run.wait_for_launcher()
    code, out, err = run.end(220)
    assert code == 6, err
    results = {result["line"]: result for result in json.loads(out.strip().splitlines()[-1])["results"]}
    for line, result in results.items():
        reason = bad.get(line, ({}, ""))[1]
        assert reason in result.get("error", "") and ("error" in result) == bool(reason), (line, result)
        if not reason:
            assert len(iio.imread(workdir / f"{line}.mp4", plugin="pyav")) == 5
    assert len(results) == 12
    assert [path for path in workdir.rglob(".*") if path.suffix in (".part", ".partial")] == []
    with subtests.test("a full disk"):
        if not small_disk:
            pytest.skip("only root can mount a small disk, so no disk was full")
        assert not (workdir / "full/11.mp4").exists() and not (workdir / "full/11.json").exists()
    pids = {int(file.read_text()) for file in workdir.glob("artifacts/runs/*/ranks/*/pid")}
    assert len(pids) > ranks and not any(Path("/proc", str(pid)).exists() for pid in pids)


def test_a_lone_rank_that_is_killed_costs_its_line(start: Start, workdir: Path) -> None:
    """As by the kernel for a lack of memory."""
    lines = [{"output": "1.mp4"}, {"output": "2.mp4", "prompt": "the rank is killed"}, {"output": "3.mp4"}]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line | {"steps": 2}) + "\n" for line in lines))
    own = with_fault(workdir, FAULTS, rank=0, replica=None)
    code, out, err = start(*SMALL, "--jobs", "jobs.jsonl", "--json", environment=own).end()
    assert code == 6, err
    errors = [result.get("error", "") for result in json.loads(out.strip().splitlines()[-1])["results"]]
    assert "rank 0 was killed by SIGKILL" in errors[1] and errors[::2] == ["", ""]
    assert [(workdir / line["output"]).exists() for line in lines] == [True, False, True]


def test_the_last_line_that_is_left_is_reported_if_its_rank_is_killed(start: Start, workdir: Path) -> None:
    """As in a list that is resumed: the line that is left is the one that was killed before."""
    lines = [{"output": "1.mp4"}, {"output": "2.mp4", "prompt": "the rank is killed"}]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line | {"steps": 2}) + "\n" for line in lines))
    for file in ("1.mp4", "1.json"):
        (workdir / file).write_text("")
    (workdir / "faults").mkdir()
    (workdir / "faults/sitecustomize.py").write_text(FAULTS)  # for the command's own process too
    in_all = {"PYTHONPATH": str(workdir / "faults")}
    code, out, err = start(*SMALL, "--jobs", "jobs.jsonl", "--skip-existing", "--json", environment=in_all).end()
    assert code == 6, err
    made, killed = json.loads(out.strip().splitlines()[-1])["results"]
    assert "skipped" in made and "rank 0 was killed by SIGKILL" in killed["error"]


def test_a_lone_rank_that_hangs_costs_its_line_whatever_it_was_doing(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is a second, and not half an hour."""
    shutil.copytree(TINY, workdir / "stuck")
    prompts: list[str] = []
    make = session.Session.make

    def noted(self: session.Session, job: Job, *others: object, **named: object) -> session.Made:
        prompts.append(job.config.video.prompt)
        return make(self, job, *others, **named)

    def hanging(work: Callable[..., Any], hangs: Callable[..., bool]) -> Callable[..., Any]:
        return lambda *arguments, **named: (
            (time.sleep(1000) if hangs(*arguments) else None) or work(*arguments, **named)
        )

    monkeypatch.setattr(pace, "_MOST_TIMEOUTS", 1.0)
    monkeypatch.setattr(session.Session, "make", noted)
    monkeypatch.setattr(
        session, "load_models", hanging(session.load_models, lambda files, *_: files.root.name == "stuck")
    )
    for method in ("encode", "_decode"):
        hangs = hanging(getattr(WanVAE, method), lambda *_, method=method: prompts[-1] == method)
        monkeypatch.setattr(WanVAE, method, hangs)
    bad: list[dict[str, Any]] = [{"prompt": "encode"}, {"prompt": "_decode"}, {"model": "stuck"}]
    lines = [line | {"output": f"{k}.mp4", "steps": 1} for k, line in enumerate([{}, *bad])]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = wanfast("generate", *SMALL, "--rank-timeout", "1", "--jobs", "jobs.jsonl", "--json")
    assert outcome.exit_code == 6, outcome.err
    said = ["", "hangs (encoding the image", "hangs (decoding, 1 of 1 steps done", "hangs (loading the models)"]
    for expected, result in zip(said, outcome.document["results"], strict=True):
        assert expected in result.get("error", "") and bool(expected) == ("error" in result), result


def test_a_group_whose_ranks_all_hang_costs_its_line(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank waits for another one, as when all read from a network disk that stopped."""
    shutil.copytree(TINY, workdir / "stuck")
    load = session.load_models

    def stuck(files: ModelFiles, *others: Any) -> Any:
        return time.sleep(1000) if files.root.name == "stuck" else load(files, *others)

    monkeypatch.setattr(session, "load_models", stuck)
    monkeypatch.setattr(pace, "_MOST_TIMEOUTS", 0.05)
    lines = [line | {"output": f"{k}.mp4", "steps": 1} for k, line in enumerate([{"model": "stuck"}, {}])]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks = ("--num-gpus", "2", "--rank-timeout", "20")
    outcome = wanfast("generate", *SMALL, *ranks, "--jobs", "jobs.jsonl", "--json")
    errors = [result.get("error", "") for result in outcome.document["results"]]
    assert "rank group 0 hangs (loading the models): it did nothing for 1 s" in errors[0] and errors[1] == ""


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
def test_a_launcher_that_hangs_is_started_again_once(
    wanfast: Callable[..., Outcome], workdir: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    import_all = worker.import_all

    def stuck() -> None:  # in the launcher, whose last argument is the number of its group
        return time.sleep(1000) if always or sys.argv[-1] == "0" else import_all()

    monkeypatch.setattr(worker, "import_all", stuck)
    monkeypatch.setattr(pace, "_MOST_TIMEOUTS", 0.05)
    lines = [{"output": f"{k}.mp4", "steps": 1} for k in range(3)]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = wanfast("generate", *SMALL, "--rank-timeout", "10", "--jobs", "jobs.jsonl", "--json")
    errors = [result.get("error", "") for result in outcome.document["results"]]
    assert len(errors) == 3
    assert all(("rank 0 hangs (before its first report)" in error) == always == bool(error) for error in errors)


@pytest.mark.slow
def test_models_that_kill_their_ranks_lose_only_their_lines(start: Start, workdir: Path) -> None:
    """The third group that dies while it loads the same models shows that these are at fault."""
    shutil.copytree(TINY, workdir / "deadly")
    lines = [{"output": f"{line}.mp4", "steps": 1} | ({"model": "deadly"} if line < 5 else {}) for line in range(1, 7)]
    (workdir / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = with_fault(workdir, FAULTS, rank=1, replica=None)
    run = start(*SMALL, "--num-gpus", "2", "--jobs", "jobs.jsonl", "--json", environment=environment)
    code, out, err = run.end(100)
    results = json.loads(out.strip().splitlines()[-1])["results"]
    assert code == 6, err
    assert ["rank 1 was killed by SIGKILL" in result.get("error", "") for result in results] == [True] * 4 + [False] * 2
    assert len(list(workdir.glob("artifacts/runs/*/ranks/*-1/pid"))) == 4  # three that died, and one that made the rest
