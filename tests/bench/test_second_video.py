"""Tests the benchmark of a session's later videos: it shows what another LoRA set reads again."""

from __future__ import annotations

import json
import sys

import pytest

from tests.bench.results import program
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.store import model_files

TINY = ("--model", "tiny", "--steps", "1", "--size", "64x64", "--frames", "5", "--device", "cpu")


def test_another_lora_set_reads_the_experts_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing else; the same set reads nothing."""
    monkeypatch.setattr(sys, "argv", ["second_video.py", *TINY, "--lora", "--videos", "3"])
    program("second_video").main()
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [video["lora"] for video in document["videos"]] == [["one.safetensors"]] * 2 + [["two.safetensors"]]
    loaded = [set(video["loading"]) for video in document["videos"]]
    assert loaded == [{*EXPERTS, "vae", "umt5"}, set(), {*EXPERTS}]
    files = model_files.locate("tiny", "artifacts")
    found = document["another_set"]
    assert found["read_bytes"] == sum(file.stat().st_size for name in EXPERTS for file in files.weights(name))
    assert found["difference_s"] == pytest.approx(found["other_s"] - found["same_s"], abs=2e-3)
    assert 0 < found["load_s"] < found["other_s"] and found["disk_bytes"] >= 0


def test_one_pair_of_videos_shows_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["second_video.py", *TINY, "--lora", "--videos", "2"])
    with pytest.raises(SystemExit):
        program("second_video").main()
    assert "--lora needs --videos 3 or more" in capfd.readouterr().err
