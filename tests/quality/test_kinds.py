"""Tests the judge of last images and of joined clips: on true clips, on damaged ones, and with the tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_pack import write_pack
from wanfast.quality import kinds, tiny
from wanfast.quality.kinds import CLIPS, Frames, KindTask, chain_figures, goes_on
from wanfast.quality.photographs import Photographs
from wanfast.quality.world import Renderer, Scene, camera_scene, draw_scene
from wanfast.runtime.engine.pixels import of_decoded, to_uint8
from wanfast.runtime.store import model_files

SIDE, STEPS = 64, 16  # STEPS: from one frame that two clips share to the next


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("pack") / "photographs.zip")


@pytest.fixture(scope="module")
def judge(pack: Path) -> tiny.Judge:
    return tiny.Judge(tiny.Settings("tiny", 1, 2.0, "fp32", side=64, frames=5, photographs=str(pack)))


def scene_that(motion: str) -> Scene:
    """Returns a scene with a square, which has corners that turn, and nothing else."""
    scene = next(s for s in (draw_scene(seed, camera_share=0.0) for seed in range(200)) if s.motion == "circle")
    assert scene.subject is not None
    subject = replace(scene.subject, shape="square", colour="red", size="big", centre=(0.5, 0.34))
    return replace(scene, subject=subject, motion=motion, bystanders=(), background="plain")


def true_chain(scene: Scene) -> Frames:
    """Renders four clips of a motion that begins again in each one where it ended; the angle of a spin adds up."""
    moments = torch.linspace(0, CLIPS, CLIPS * STEPS + 1, dtype=torch.float64)
    return to_uint8(Renderer("cpu")([scene], moments, size=(SIDE, SIDE))[0])


@pytest.mark.parametrize("motion", ["circle", "spin"])
def test_a_true_chain_is_smooth_and_its_motion_goes_on(motion: str) -> None:
    figures = chain_figures(true_chain(scene_that(motion)), "shape", scene_that(motion))
    assert figures["goes_on"] == [True] * 3 and figures["shown"] == [motion] * 4
    assert len(figures["seams"]) == 3 and len(figures["inside"]) == CLIPS * STEPS - 3
    assert np.mean(figures["seams"]) <= 1.01 * np.percentile(figures["inside"], 95)  # every half turn looks the same


@pytest.mark.parametrize("motion", ["circle", "spin"])
def test_a_motion_that_turns_back_stops_or_is_lost_does_not_go_on(motion: str) -> None:
    scene, frames = scene_that(motion), true_chain(scene_that(motion))
    window, share = frames[STEPS - 2 : STEPS + 3], 2 / STEPS
    assert goes_on(window, "shape", scene, share) is True
    back = np.concatenate((window[:3], window[1::-1]))
    stopped = np.concatenate((window[:3], window[2:3], window[2:3]))
    begun = np.concatenate((window[2:3], window[2:3], window[2:]))
    for wrong in (back, stopped, begun, np.zeros_like(window)):
        assert goes_on(wrong, "shape", scene, share) is False


@pytest.mark.parametrize(("degrees", "goes"), [(0, True), (50, True), (-50, True), (70, False), (-70, False)])
def test_a_circle_turns_at_a_seam_as_inside_a_clip(monkeypatch: pytest.MonkeyPatch, degrees: int, goes: bool) -> None:
    """The direction after a seam is compared with the expected one, which a circle reaches by a turn of 45 degrees."""
    scene, share = scene_that("circle"), 2 / STEPS
    known, tolerance = kinds._judge_of("shape", scene)
    start, end = known([0.0, share]), known([1 - share, 1.0])
    before, after = (end[1] - end[0]) / tolerance, (start[1] - start[0]) / tolerance
    assert before @ after / np.linalg.norm(before) / np.linalg.norm(after) == pytest.approx(2**-0.5)
    turn = np.exp(1j * np.radians(degrees)) * complex(*after[:2])
    path = np.stack((-before, 0 * before, [turn.real, turn.imag, *after[2:]])) * tolerance
    monkeypatch.setattr(kinds, "_followed", lambda *_: path)
    assert goes_on(np.zeros((5, 8, 8, 3), np.uint8), "shape", scene, share) is goes
    assert np.allclose(kinds.turned(np.eye(4)[3], before, after), np.eye(4)[3])  # other quantities do not turn


def test_a_still_shape_has_no_motion_that_could_go_on() -> None:
    scene = scene_that("still")
    assert chain_figures(true_chain(scene), "shape", scene)["goes_on"] == [None] * 3


@pytest.mark.parametrize("name", ["pan left", "zoom in", "turn right"])
def test_the_motion_of_a_camera_goes_on_or_not(pack: Path, name: str) -> None:
    photographs = Photographs(pack, "cpu", held_out=True)
    scene = next(s for index in range(9) if (s := camera_scene(index, photographs, (SIDE, SIDE))).camera == name)
    moments = torch.linspace(0.25, 0.75, 5, dtype=torch.float64)
    window = to_uint8(Renderer("cpu", photographs)([scene], moments, size=(SIDE, SIDE))[0])
    assert goes_on(window, "camera", scene, 0.25) is True
    assert goes_on(np.concatenate((window[:3], window[1::-1])), "camera", scene, 0.25) is False
    assert goes_on(np.concatenate((window[:3], window[2:3], window[2:3])), "camera", scene, 0.25) is False


def chain_row(frames: Frames, scene: Scene) -> dict[str, Any]:
    about = {"kind": "chain", "mover": "shape", "asked": scene.motion, "round_trips": [0.25, 0.5, 0.75]}
    return {**about, **chain_figures(frames, "shape", scene)}


def test_a_jump_at_a_seam_and_a_drift_of_colours_are_figures() -> None:
    scene = scene_that("circle")
    frames = true_chain(scene)
    drifted = frames.copy()
    for clip in range(1, CLIPS):
        drifted[clip * STEPS + 1 : (clip + 1) * STEPS + 1, ..., 0] += np.uint8(10 * clip)  # red; no pixel overflows
    settings = tiny.Settings("tiny", 1, 2.0, "fp32")
    still = {**chain_row(frames, scene), "asked": "still", "goes_on": [None] * 3}
    found = kinds.summarise([chain_row(frames, scene), chain_row(drifted, scene), still], settings, 1.0)
    chains = found["chains"]["shape"]
    assert (chains["smooth_videos"]["right"], chains["smooth_videos"]["of"]) == (2, 3)
    assert (chains["motion_goes_on"]["right"], chains["motion_goes_on"]["of"]) == (6, 6)
    ((_, goes_on),) = chains["motion_goes_on_by_motion"].items()  # still shapes do not count
    assert goes_on == [6, 6]
    assert {name: of["smooth_videos"] for name, of in chains["seams_by_motion"].items()} == {
        "circle": [1, 2],
        "still": [1, 1],
    }
    circle, still_ones = (chains["seams_by_motion"][name] for name in ("circle", "still"))
    assert circle["seams"] > chains["difference"]["seams"] > still_ones["seams"] and circle["inside"] > 0
    assert chains["difference"]["round_trip"] == circle["round_trip"] == 0.5
    assert found["weights"] == model_files.locate("tiny", "artifacts").fingerprints
    assert chains["difference"]["seams"] > chains["difference"]["inside"] and found["between"] == {}
    for clip, drift in enumerate(chains["drift"], 1):
        assert drift["mean"] == pytest.approx([10 * clip / 3, 0, 0], abs=0.2)  # one of three
        assert drift["mean_size"][0] == pytest.approx(10 * clip / 3, abs=0.2)
        assert drift["deviation"] == pytest.approx([0, 0, 0], abs=0.2)
    assert chains["drift_of_still_videos"][2]["mean"] == pytest.approx([0, 0, 0], abs=0.2)
    assert [place["of"] for place in chains["prompt_following"]] == [3] * CLIPS


def test_a_clip_starts_from_the_last_frame_of_the_one_before(
    judge: tiny.Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []
    by_plan = judge.by_plan

    def recorded(pipeline: Any, plan: Any, prompt: str, image: torch.Tensor, *, last: None) -> torch.Tensor:
        video = by_plan(pipeline, plan, prompt, image, last=last)
        made.append((plan.config.video.seed, prompt, image, video))
        return video

    monkeypatch.setattr(judge, "by_plan", recorded)
    row = kinds.judged(judge, KindTask("chain", "camera", 1))
    scene, truth = judge.held_out(1, "camera")
    assert [(seed, prompt) for seed, prompt, _, _ in made] == [(1 + clip, scene.caption) for clip in range(CLIPS)]
    assert torch.equal(made[0][2], truth[:, 0])
    for (*_, before), (_, _, image, _) in pairwise(made):
        assert torch.equal(image, of_decoded(to_uint8(before[:, -1:])[0]))
    vae, start = judge.pipeline.vae, made[1][2][:, None]
    again = to_uint8(vae.decode(vae.encode(start[None]))[0])
    difference = np.abs(again.astype(int) - to_uint8(start)).mean()
    assert (
        len(row["round_trips"]) == CLIPS - 1 and row["round_trips"][0] == pytest.approx(difference) and difference > 0
    )
    joined = np.concatenate([to_uint8(made[0][3]), *(to_uint8(video)[1:] for *_, video in made[1:])])
    assert row["seams"] == chain_figures(joined, "camera", scene)["seams"] and row["asked"] == scene.camera


def test_a_last_image_is_given_or_not(judge: tiny.Judge) -> None:
    row = kinds.judged(judge, KindTask("between", "shape", 2))
    assert row["psnr"] != row["psnr_without"]  # same noise and prompt, so the last image made the difference
    near = {**row, "psnr": 25.0, "psnr_without": 24.9}
    found = kinds.summarise([near], judge.settings, 1.0)["between"]["shape"]
    assert found["given"]["last_frame_reached"]["right"] == 1 and found["not_given"]["last_frame_reached"]["right"] == 0


def test_chains_of_shapes_stay_in_the_frame() -> None:
    tasks = kinds.tasks_of(2, 6, ("shape", "camera"))
    assert [(task.kind, task.mover) for task in tasks] == (
        [("between", "shape")] * 2 + [("chain", "shape")] * 6 + [("between", "camera")] * 2 + [("chain", "camera")] * 6
    )
    assert [task.index for task in tasks[10:]] == list(range(6))
    chained = [draw_scene(task.index, held_out=True, camera_share=0.0) for task in kinds.tasks_of(0, 30, ("shape",))]
    assert {scene.motion for scene in chained} == {"circle", "spin", "still"}


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = scene_that("circle")

    def judge_all(judged: Any, tasks: list[KindTask], settings: tiny.Settings, processes: int, *, every: int) -> Any:
        assert (judged, settings.side, processes, len(tasks)) == (kinds.judged, 64, 3, 3)
        near = {"kind": "between", "mover": "shape", "asked": "up", "shown": "up", "psnr": 30.0, "psnr_without": 20.0}
        return [near, near, chain_row(true_chain(scene), scene)]

    monkeypatch.setattr(kinds, "judge_all", judge_all)
    file = tmp_path / "new/kinds.json"
    words = ["--pairs", "2", "--chains", "1", "--side", "64", "--processes", "3", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["kinds", *words])
    kinds.main()
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(file.read_text()) and document["between"]["shape"]["given"]["last_frame_psnr"] == 30
