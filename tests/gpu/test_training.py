"""Tests training on a GPU: a resumed run equals an uninterrupted one, bit for bit.

The runs also compare their first gradients of each shape with those without a CUDA graph.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.test_training import equal, final
from training.spec import SPEC
from training.train_experts import Clips, Kind
from training.train_lora import Paths

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_clips(kind: Kind, device: str, count: int = 64) -> Clips:
    """Returns clips of random latents and random captions, of the sizes of a kind."""
    generator = torch.Generator().manual_seed(0)
    T, (w, h) = (kind.form.frames + 3) // 4, (side // 8 for side in kind.form.size)
    z, y = (torch.randn(count, c, T, h, w, generator=generator).bfloat16().to(device) for c in (16, 20))
    ids = torch.randint(3, 900, (count + 1, 40), generator=generator).to(device)
    return Clips(z, y, ids, torch.randint(5, 40, (count + 1,), generator=generator).to(device))


def random_paths(kind: Kind, device: str) -> Paths:
    clips, generator = random_clips(kind, device), torch.Generator().manual_seed(1)
    samples = torch.randn(len(clips.z), 5, *clips.z.shape[1:], generator=generator)
    text = torch.randn(len(clips.z), 40, SPEC.dit.text_dim, generator=generator)
    return Paths(samples.half().to(device), clips.y, text.to(device))


# The true sizes and batches of `python -m training`, on random latents; "cut" after 22 of 60 steps.
PIECE = """
import itertools, sys
from dataclasses import replace
from pathlib import Path
import torch
import training.loop
from tests.small_pack import write_pack
from tests.gpu.test_training import random_clips, random_paths
from training import train_experts, train_lora, train_vae
from training.clips import Mix
from training.spec import SPEC
from wanfast.runtime.store import model_files

stage, piece, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
training.loop.prepare_torch()
if piece == "cut":
    calls = itertools.count()
    training.loop.monotonic = lambda: 0.0 if next(calls) < 46 else 1e9
deadline = 480.0 if piece == "cut" else float("inf")
schedule = training.loop.Schedule(steps=60, muon_rate=1e-3, warmup=2, log_every=20, deadline=deadline)
folder.mkdir(exist_ok=True)
tiny = model_files.locate("tiny", "artifacts")
if stage.startswith("experts"):
    alone = {"start": tiny, "learning": "high_noise"} if stage != "experts" else {}
    sets = [random_clips(kind, "cuda") for kind in train_experts.KINDS]
    batches = [kind.batch for kind in train_experts.KINDS]
    train_experts.fit(SPEC, sets, schedule, folder, "cuda", batches, train_experts.ORDER, **alone)
elif stage == "lora":
    sets = [random_paths(kind, "cuda") for kind in train_lora.KINDS]
    batches = [kind.batch for kind in train_lora.KINDS]
    train_lora.fit(train_experts.trained(tiny).to("cuda"), sets, schedule, folder, batches)
else:
    mix = Mix(write_pack(folder / "photographs.zip"), "cuda")
    kinds = [replace(kind, count=40) for kind in (train_vae.SHORT if stage == "vae-short" else train_vae.LONG)]
    pools = [train_vae.render(mix, kind, 0) for kind in kinds]
    if stage != "vae-short":
        weights = [p.detach() for p in train_vae.build(SPEC.vae, "cuda").parameters()]
        torch.save({"ema": weights}, folder / ("vae-short.pt" if stage == "vae-long" else train_vae.FINISHED))
    train_vae.fit(SPEC.vae, pools, schedule, folder, kinds, stage)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["vae-short", "vae-long", "vae-decoder", "experts", "experts-high_noise", "lora"])
def test_resumed_training_is_the_same_training(tmp_path: Path, stage: str) -> None:
    def run(piece: str, folder: str) -> int:
        subprocess.run([sys.executable, "-c", PIECE, stage, piece, str(tmp_path / folder)], check=True)
        return int(final(tmp_path / folder, stage)["step"])

    assert run("whole", "whole") == 60
    assert 0 < run("cut", "pieces") < 60
    assert run("rest", "pieces") == 60
    assert equal(final(tmp_path / "pieces", stage), final(tmp_path / "whole", stage))
    print(f"{stage}: cut, resumed in another process, equal to the last bit on {torch.cuda.get_device_name()}")
