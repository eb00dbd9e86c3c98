"""Tests that tensors arrive on a GPU as they are in their files, whatever their size, dtype and order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanfast.runtime.device import staging
from wanfast.runtime.errors import CorruptArtifactError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TENSORS = {
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 7),
    "odd": torch.randn(1001, 333),
    "bf16": torch.randn(2048, 1024).bfloat16(),
    "int8": torch.randint(-128, 127, (999, 1001), dtype=torch.int8),
}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_tensors_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    """Their memory on the GPU is used again at once, and many pieces are on their way."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(staging, "_AHEAD_BYTES", 1 << 20)
    save_file(TENSORS, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        sources = [(name, file.get_tensor(name)) for _ in range(20) for name in TENSORS]
        with torch.inference_mode() if inference else nullcontext():
            for name, tensor in staging.to_device(iter(sources), "cuda", cores=4):
                assert tensor.is_cuda
                assert torch.equal(tensor.cpu(), TENSORS[name])
                tensor.zero_()


def test_an_error_of_a_reader_ends_the_threads() -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.ones(5)
        raise CorruptArtifactError("damaged")

    with pytest.raises(CorruptArtifactError):
        list(staging.to_device(failing(), "cuda", cores=2))
