"""On a GPU too, a training that was cut and resumed is, bit for bit, the one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import training.loop
from tests.test_training import equal, final
from training import train_experts, train_vae
from training.loop import Schedule, make_deterministic
from training.spec import SPEC
from wanfast.quality.world import Renderer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["vae", "experts"])
def test_resumed_training_is_the_same_training(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true sizes, batches and compiled blocks of `python -m training`, 12 steps of them."""
    make_deterministic()
    clips = train_experts.encode_clips(train_vae.build(SPEC.vae, "cuda").eval(), Renderer("cuda"), 128)

    def run(folder: Path) -> bool:
        schedule = Schedule(steps=12, learning_rate=1e-3, warmup=2, log_every=1)
        if stage == "vae":
            return train_vae.fit(SPEC.vae, schedule, folder, "cuda", batch=32, side=64, frames=9)
        return train_experts.fit(SPEC, clips, schedule, folder, "cuda", batch=96)

    try:
        assert run(tmp_path / "whole")
        clock = iter([0.0] * 20 + [1e9] * 40)  # time runs out after some steps
        monkeypatch.setattr(training.loop, "monotonic", lambda: next(clock))
        assert not run(tmp_path / "pieces")
        monkeypatch.undo()
        done = final(tmp_path / "pieces", stage)["step"]
        assert 0 < done < 12
        assert run(tmp_path / "pieces")
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(final(tmp_path / "pieces", stage), final(tmp_path / "whole", stage))
    print(f"{stage}: cut after {done} of 12 steps, resumed, equal to the last bit on {torch.cuda.get_device_name()}")
