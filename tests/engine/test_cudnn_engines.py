"""Tests that the choice of cuDNN's engines is stored whole, and used again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_ranks import on_ranks
from tests.small_model import plan_small_model
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import cudnn_engines
from wanfast.runtime.engine.cudnn_engines import digest, kept_engines
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.models import convolution
from wanfast.runtime.planning.plan import Plan


@pytest.fixture
def plan(small_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Returns a plan for a machine that pretends to have a GPU and cuDNN's front end."""
    monkeypatch.setattr(convolution, "HAS_FRONT_END", True)
    monkeypatch.setattr(convolution, "_chosen", {})
    monkeypatch.setattr(convolution, "_used", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    return plan_small_model(small_model)[0]


def convolve(shape: int, engine: str) -> None:
    """Pretends that a convolution ran: with its engine, or else with the one that a search finds."""
    problem = convolution._Problem(0, torch.float32, (shape,), (1,), (1, 1, 1), (0, 0, 0))
    convolution._chosen.setdefault(problem.name, engine)
    convolution._used.add(problem)


def run(plan: Plan, *shapes: int, engine: str, new_process: bool = True) -> dict[str, str]:
    """Returns the engines of a video whose convolutions have these shapes."""
    if new_process:
        convolution._chosen.clear()
    with kept_engines(plan, Ranks("cuda")) as engines:
        for shape in shapes:
            convolve(shape, engine)
    return engines


def stored() -> dict[str, Any]:
    (file,) = Path("artifacts/cudnn").glob("*/engines.json")
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_a_choice_is_used_again(plan: Plan) -> None:
    first = run(plan, 1, 2, engine="a")
    assert set(first.values()) == {"a"} and stored() == {"0": first}
    assert run(plan, 1, 2, engine="b") == first
    assert digest(first) == digest(dict(reversed(first.items()))) and digest({}) is None


def test_a_choice_that_lacks_a_shape_is_completed(plan: Plan) -> None:
    """As when the first video of a size failed after some convolutions, in this process or another."""
    with pytest.raises(RuntimeError, match="lost"), kept_engines(plan, Ranks("cuda")):
        convolve(1, "a")
        raise RuntimeError("lost")
    assert not Path("artifacts/cudnn").exists()
    assert sorted(run(plan, 1, 2, engine="b", new_process=False).values()) == ["a", "b"]
    assert sorted(stored()["0"].values()) == ["a", "b"]
    assert sorted(run(plan, 1, 2, 3, engine="c").values()) == ["a", "b", "c"]
    assert sorted(stored()["0"].values()) == ["a", "b", "c"]


def test_the_record_of_a_video_names_the_engines_of_all_ranks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for engine in ("a", "b"):

        def of_both(self: Ranks, value: object, engine: str = engine) -> list[object]:
            return [value, {"shape": engine} if isinstance(value, dict) else value]

        monkeypatch.setattr(Ranks, "gather", of_both)
        digests.append(digest(run(plan, 1, engine="a")))
    assert digests[0] != digests[1]
    assert stored()["1"] == {"shape": "a"} and list(stored()["0"].values()) == ["a"]


def test_what_another_group_stored_meanwhile_stays_and_is_used_from_then_on(plan: Plan) -> None:
    """Both groups searched before one had stored."""
    with kept_engines(plan, Ranks("cuda")) as own:
        first = run(plan, 1, engine="a")  # by the other group
        convolution._chosen.clear()
        convolution._used.clear()
        convolve(1, "b")
        convolve(2, "b")
    assert sorted(own.values()) == ["b", "b"]  # what this video was made with
    assert sorted(stored()["0"].values()) == ["a", "b"] and first.items() <= stored()["0"].items()
    assert sorted(run(plan, 1, 2, engine="c", new_process=False).values()) == ["a", "b"]
    assert sorted(stored()["0"].values()) == ["a", "b"]


def test_ranks_of_unlike_gpus_do_not_wait_for_each_other(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_videos(ranks: Ranks) -> list[list[str]]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"GPU {ranks.rank}")
        made = []
        for engine in ("a", "b"):
            convolution._chosen.clear()
            with kept_engines(plan, dataclasses.replace(ranks, device="cuda")) as engines:
                convolve(1, engine)
            made.append(sorted(engines.values()))
        return made

    assert on_ranks(Mesh(cfg=2), two_videos, timeout_s=20) == [[["a", "a"]] * 2] * 2


def test_what_decides_the_choice_is_in_its_key(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cudnn_engines._inputs(plan, Ranks("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99)
    monkeypatch.setattr(cudnn_engines, "version_of", lambda package: "99")
    monkeypatch.setattr(cudnn_engines, "digest_of_code", lambda *files: "other code")
    after = cudnn_engines._inputs(plan, Ranks("cuda"))
    assert {name for name in before if before[name] != after[name]} == {"gpus", "cudnn", "front_end", "code"}
    assert before["size"] == [plan.geometry.width, plan.geometry.height]


def test_an_artifact_that_cannot_be_stored_loses_no_video(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("artifacts").mkdir(exist_ok=True)
    Path("artifacts/cudnn").write_text("a file, not a folder")
    assert len(run(plan, 1, engine="a")) == 1
    assert "searches for cuDNN's engines again" in capsys.readouterr().err
