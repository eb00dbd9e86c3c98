"""Tests quantized experts on a GPU at A14B's width: stored equals quantized on the fly, compiled equals eager."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.test_fused import check_only_token_5_is_lost, heads_with, quantized_with
from tests.one_expert import velocity, write_expert
from tests.parity import relative_error
from wanfast.runtime.config import QuantizeConfig
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.jobs import quantize
from wanfast.runtime.models import fused
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.tokens import LARGEST
from wanfast.runtime.store import model_files
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.quantized import QuantizedExpert
from wanfast.runtime.weights.builders import build_expert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPEC = dataclasses.replace(A14B.dit, num_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> model_files.ModelFiles:
    return write_expert(tmp_path_factory.mktemp("expert") / "source", SPEC)


def on_gpu(model: WanDiT) -> Tensor:
    return velocity(model, (2, 32, 32), "cuda")


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@torch.inference_mode()
def test_no_kernel_hides_a_number_that_is_not_finite(value: float) -> None:
    for dtype in LARGEST:
        check_only_token_5_is_lost(quantized_with(value, fused, dtype, "cuda"))
    if math.isnan(value):
        check_only_token_5_is_lost(heads_with(value, fused, "cuda"))


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8-dynamic", "fp8-rowwise"])
@torch.inference_mode()
def test_round_trip_and_compiled(source: model_files.ModelFiles, tmp_path: Path, scheme: Scheme) -> None:
    config = QuantizeConfig(
        model=str(source.root), scheme=scheme, expert="high", device="cuda", artifacts_dir=str(tmp_path)
    )
    list(quantize.run(config))
    expert = QuantizedExpert(ArtifactStore(tmp_path), source, "high_noise", scheme, str(source.root))
    kept, on_the_fly = (
        build_expert(source, "high_noise", "bf16", Ranks("cuda"), quantized=expert, on_the_fly=fly)
        for fly in (False, True)
    )
    expected = on_gpu(kept)
    assert torch.equal(on_gpu(on_the_fly), expected)
    exact = on_gpu(build_expert(source, "high_noise", "fp32", Ranks("cuda")))
    assert 1e-4 < relative_error(expected, exact.double()) < 0.1
    compile_blocks(kept, "default")
    error = relative_error(on_gpu(kept), expected.double())
    print(f"{scheme}: {relative_error(expected, exact.double()):.4f}; compiled {error:.5f}")
    assert error < 0.01
