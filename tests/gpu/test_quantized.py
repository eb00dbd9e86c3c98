"""Quantized experts on a GPU at A14B's width: kept and loaded is quantized while loading, compiled is eager."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity import randomise, relative_error
from wanfast.runtime import checkpoint, model_files, quantize
from wanfast.runtime.artifacts import ArtifactStore
from wanfast.runtime.builders import build_expert
from wanfast.runtime.compilation import compile_blocks
from wanfast.runtime.config import QuantizeConfig, Recipe
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.model_spec import A14B
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.quantized_artifacts import QuantizedExpert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPEC = dataclasses.replace(A14B.dit, num_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> model_files.ModelFiles:
    folder = tmp_path_factory.mktemp("source") / "high_noise_model"
    model = WanDiT(SPEC, torch.float32)
    randomise(model, seed=1)
    checkpoint.save(model, folder / "whole.safetensors", component="dit", layout="original")
    names = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_dim", "text_len", "eps")
    sizes = {name: getattr(SPEC, name) for name in names} | {"in_dim": 36, "out_dim": 16}
    (folder / "config.json").write_text(json.dumps(sizes))
    return model_files.locate(str(folder.parent), str(folder.parent))


def velocity(model: WanDiT) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(2)
    latent, condition = (torch.randn(1, c, 2, 32, 32, generator=generator, device="cuda") for c in (16, 20))
    text = model.encode_text(torch.randn(1, 7, SPEC.text_dim, generator=generator, device="cuda"))
    rope = rotary_tables((2, 16, 16), SPEC.head_dim, "cuda")
    return model(latent, condition, torch.tensor([617], device="cuda"), text, rope)


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-dynamic", "fp8-rowwise"])
@torch.inference_mode()
def test_round_trip_and_compiled(source: model_files.ModelFiles, tmp_path: Path, recipe: Recipe) -> None:
    config = QuantizeConfig(
        model=str(source.root), recipe=recipe, expert="high", device="cuda", artifacts_dir=str(tmp_path)
    )
    list(quantize.run(config))
    expert = QuantizedExpert(ArtifactStore(tmp_path), source, "high_noise", recipe, str(source.root))
    kept, on_the_fly = (
        build_expert(source, "high_noise", "bf16", Ranks("cuda"), quantized=expert, on_the_fly=fly)
        for fly in (False, True)
    )
    expected = velocity(kept)
    assert torch.equal(velocity(on_the_fly), expected)
    exact = velocity(build_expert(source, "high_noise", "fp32", Ranks("cuda")))
    assert 1e-4 < relative_error(expected, exact.double()) < 0.1
    compile_blocks(kept, "default")
    error = relative_error(velocity(kept), expected.double())
    print(f"{recipe}: {relative_error(expected, exact.double()):.4f}; compiled {error:.5f}")
    assert error < 0.01
