"""Tests that LoRAs are merged on a GPU in float32, whatever the settings for other products are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import lora_files
from tests.lora_files import low_rank, of_blocks
from tests.parity import relative_error
from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.store.loras import find_loras
from wanfast.runtime.weights.lora import merge_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPEC = DiTSpec(dim=256, ffn_dim=320, num_heads=4, num_layers=1, freq_dim=32, text_dim=24, text_len=16)


def test_products_are_float32_with_tf32_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    wanted = of_blocks(SPEC)
    tensors, merged = low_rank(wanted, {module: module for module in wanted}, alpha=2.0)
    file = lora_files.write(tmp_path / "one.safetensors", tensors)
    merge = merge_of(find_loras(ModelsConfig(lora=(str(file),)), tmp_path), "low_noise", SPEC)
    for name, change in merged.items():
        rows = torch.zeros(change.shape, device="cuda")
        sums, finite = merge(name, rows, (0, len(rows)))
        assert relative_error(sums.cpu(), change) <= 1e-6
        assert len(finite) == 2 and all(flag.is_cuda and flag for flag in finite.values())
    assert torch.backends.cuda.matmul.allow_tf32
