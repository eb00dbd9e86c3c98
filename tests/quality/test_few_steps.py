"""Tests the judge of distilled weights, with the tiny model and a pair of LoRAs of random values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lora_files
from wanfast.quality import few_steps, tiny
from wanfast.quality.distilled import PAIR
from wanfast.quality.few_steps import FewStepsTask
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.store import model_files

PLAIN = ("plain", "plain, guided", "plain, as --steps", "plain, as --steps, guided")


def with_pair(folder: Path, strength: float) -> Path:
    """Copies the tiny model, and adds a LoRA of random factors for each expert."""
    torch.manual_seed(0)
    own = lora_files.tiny_without_loras(folder)
    blocks = lora_files.of_blocks(model_files.locate("tiny", str(folder)).spec.dit)
    (own / f"loras/{PAIR}").mkdir(parents=True)
    for expert in EXPERTS:
        tensors, _ = lora_files.low_rank(blocks, {name: f"diffusion_model.{name}" for name in blocks})
        scaled = {name: tensor * strength for name, tensor in tensors.items()}
        lora_files.write(own / f"loras/{PAIR}/{expert}.safetensors", scaled)
    return own


def judge_of(model: Path) -> tiny.Judge:
    return tiny.Judge(tiny.Settings(str(model), steps=6, guidance=2.0, precision="fp32", side=64, frames=5))


def test_a_student_is_compared_with_the_teacher_and_with_plain_weights(tmp_path: Path) -> None:
    judge = judge_of(with_pair(tmp_path, 0.2))
    planned = dict(few_steps.plans(judge, PAIR, seed=3))
    assert {name: plan.num_forwards for name, plan in planned.items()} == {
        "teacher": 12, "student": 4, "plain": 4, "plain, guided": 8, "plain, as --steps": 4,
        "plain, as --steps, guided": 8,
    }  # fmt: skip
    assert {plan.config.video.seed for plan in planned.values()} == {3}
    student, plain, guided, spaced, _ = list(planned.values())[1:]
    assert student.levels == plain.levels == guided.levels != spaced.levels
    assert [bool(plan.config.models.lora_high_noise) for plan in planned.values()] == [False, True] + [False] * 4
    result = few_steps.judged(judge, FewStepsTask(3, "shape"))
    ways = result["ways"]
    assert "psnr_teacher" not in ways["teacher"] and set(ways) == {"teacher", "student", *PLAIN}
    assert len({way["psnr_teacher"] for way in list(ways.values())[1:]}) == 5  # no two of the videos are the same
    assert all(way["first_frame_psnr"] > 20 for way in ways.values()) and result["asked"]


def test_a_pair_that_adds_nothing_is_the_plain_model(tmp_path: Path) -> None:
    ways = few_steps.judged(judge_of(with_pair(tmp_path, 0.0)), FewStepsTask(3, "shape"))["ways"]
    assert ways["student"] == ways["plain"]


def result_of(index: int, mover: str, student: float, plain: float, shown: str) -> dict[str, Any]:
    way = {"first_frame_psnr": 40.0, "psnr": 30.0, "ssim_teacher": 0.9, "shown": "up"}
    ways = {"teacher": dict(way), "student": way | {"psnr_teacher": student, "shown": shown}}
    return {"index": index, "mover": mover, "asked": "up", "ways": ways | {"plain": way | {"psnr_teacher": plain}}}


def test_differences_are_paired() -> None:
    """The PSNRs of single videos differ by far more than those of a pair."""
    results = [result_of(k, "shape", 30.0 + 5 * k + 0.1 * (k % 2), 29.0 + 5 * k, "up") for k in range(6)]
    results += [result_of(0, "camera", 20.0, 21.0, "down")]
    found = few_steps.summarise(results, {"teacher": 80, "student": 4, "plain": 4})
    teacher, student, plain = found["shape"]
    assert "psnr_teacher" not in teacher and "paired_psnr" not in student
    assert (teacher["forwards"], student["forwards"]) == (80, 4)
    assert student["psnr_teacher"]["mean"] == 42.55 and student["psnr_teacher"]["95%"][0] < 34
    assert plain["paired_psnr"]["mean"] == 1.05 and plain["student_nearer"]["right"] == 6
    assert plain["paired_psnr"]["95%"] == pytest.approx([0.993, 1.107], abs=0.002)
    assert found["camera"][2]["paired_psnr"] == {"mean": -1.0, "95%": None, "of": 1}
    assert found["camera"][1]["prompt_following"]["right"] == 0
    assert "is nearer by +1.05 dB (95 % interval +0.99 to +1.11)" in few_steps.said(plain)
    assert few_steps.said(found["camera"][2]).endswith("nearer by -1.00 dB")


@pytest.mark.parametrize(("number", "quantile"), [(5, 2.776), (10, 2.262), (100, 1.984)])
def test_the_interval_of_a_mean_is_students(number: int, quantile: float) -> None:
    values = [float(k) for k in range(number)]
    low, high = tiny.mean_of(values)["95%"]
    error = float(torch.tensor(values).std()) / number**0.5
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=0.02)


def test_the_command_needs_the_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = with_pair(tmp_path, 0.0)
    (own / f"loras/{PAIR}/low_noise.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["few_steps", "--model", str(own)])
    with pytest.raises(SystemExit) as ended:
        few_steps.main()
    assert ended.value.code == 2 and "low_noise.safetensors is missing: train the pair" in capsys.readouterr().err


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, file = with_pair(tmp_path, 0.1), tmp_path / "new/few.json"

    def judge_all(
        judged: Any, tasks: list[FewStepsTask], settings: tiny.Settings, processes: int, *, every: int
    ) -> Any:
        assert (judged, settings.steps, processes) == (few_steps.judged, 40, 3)
        assert tasks == [FewStepsTask(0, "shape"), FewStepsTask(1, "shape")]
        results = [result_of(task.index, task.mover, 30.0, 29.0 - task.index, "up") for task in tasks]
        return [r | {"ways": r["ways"] | dict.fromkeys(PLAIN, r["ways"]["plain"])} for r in results]

    monkeypatch.setattr(few_steps, "judge_all", judge_all)
    words = ["--model", str(own), "--pairs", "2", "--processes", "3", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["few_steps", *words])
    few_steps.main()
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document == json.loads(file.read_text()) and len(document["lora_sha256"]) == 2
    assert [row["way"] for row in document["shape"]] == ["teacher", "student", *PLAIN]
    assert lines[0] == "what moves: the shape" and lines[1].startswith("teacher ")
