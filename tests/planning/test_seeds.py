"""Tests that every seed that is accepted acts, and that a seed of an older version gives the video that it gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome
from wanfast.runtime.config.video import CPU_SEEDS

Wanfast = Callable[..., Outcome]
SMALL = ("--model", "tiny", "--size", "64x64", "--frames", "5", "--steps", "1", "--device", "cpu")
GOOD = ("generate", "--image", "cat.png", "--prompt", "a cat", *SMALL)


def test_a_seed_that_the_cpu_would_cut_off_is_refused(wanfast: Wanfast) -> None:
    """It gave the video of another seed."""
    refused = wanfast(*GOOD, "--seed", str(CPU_SEEDS + 1), "--dry-run")
    assert refused.exit_code == 2
    assert "--seed 4294967297" in refused.err and "use 0 to 4294967295 (1 gives the same noise)" in refused.err
    assert wanfast(*GOOD, "--seed", str(CPU_SEEDS - 1), "--dry-run").exit_code == 0


def test_the_generator_of_the_cpu_takes_32_bits() -> None:
    """If this fails, torch has changed, and all seeds may be accepted."""
    draw = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, CPU_SEEDS + 1, CPU_SEEDS - 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("flat", [False, True])
def test_a_seed_of_an_older_version_is_the_one_that_acted(wanfast: Wanfast, workdir: Path, flat: bool) -> None:
    first = wanfast(*GOOD, "--seed", "1", "--json").document
    document = json.loads(Path("out.json").read_text())
    effective = document["effective"]
    effective["video"]["seed"] = CPU_SEEDS + 1
    if flat:
        parts = [effective[name] or {} for name in ("models", "video", "skipping", "ranks", "output")]
        document["effective"] = {name: value for part in parts for name, value in part.items()}
    Path("out.json").write_text(json.dumps(document))
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json")
    assert again.exit_code == 0, again.err
    assert again.document["plan"]["seed"] == 1
    assert again.document["output_sha256"] == first["output_sha256"]


def test_what_is_wrong_in_a_sidecar_is_said(wanfast: Wanfast, workdir: Path) -> None:
    assert wanfast(*GOOD).exit_code == 0
    document = json.loads(Path("out.json").read_text())
    document["effective"]["video"]["fps"] = 0
    Path("out.json").write_text(json.dumps(document))
    outcome = wanfast("generate", "--from", "out.json")
    assert (
        outcome.exit_code == 2 and "out.json holds an option that cannot be used: --fps 0: use 1 to 240" in outcome.err
    )
    assert "; correct this option in the file, or use the .json of another video" in outcome.err
    missing = wanfast("generate", "--from", "none.json")
    assert missing.exit_code == 2 and "none.json: no such file; check the path" in missing.err
    Path("video.mp4").write_bytes(b"\x00\xff mp4")
    video = wanfast("generate", "--from", "video.mp4")
    assert video.exit_code == 2 and "video.mp4: is not UTF-8 text: give the .json that wanfast writes" in video.err
