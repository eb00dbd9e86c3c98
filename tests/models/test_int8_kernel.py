"""Tests the int8 product against integers. Without a GPU Triton interprets the kernel, with a smaller tile."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from tests.parity import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("tokens", "k", "n"), [(150, 96, 40), (16, 64, 64), (70, 160, 136), (300, 64, 136), (513, 5120, 512)]
)
@torch.no_grad()
def test_int8_product(monkeypatch: pytest.MonkeyPatch, tokens: int, k: int, n: int) -> None:
    kernel = importlib.import_module("wanfast.runtime.models.int8_kernel")
    if DEVICE == "cpu":
        if k > 1000:
            pytest.skip("the interpreter is slow")
        monkeypatch.setattr(kernel, "_TILE", {"BLOCK_L": 32, "BLOCK_N": 64, "BLOCK_K": 32})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randint(-127, 128, (rows, k), generator=generator).to(torch.int8) for rows in (tokens, n))
    token_scale, scale = (torch.rand(rows, generator=generator) / 100 for rows in (tokens, n))
    bias = torch.randn(n, generator=generator).bfloat16()
    expected = (values.long() @ weight.long().T).double() * token_scale.double().unsqueeze(1) * scale.double()
    out = kernel.int8_product(*(x.to(DEVICE) for x in (values, weight, token_scale, scale, bias)))
    assert out.shape == (tokens, n) and out.dtype == torch.bfloat16
    assert relative_error(out.cpu(), expected + bias.double()) <= 2.0**-8  # the interpreter truncates
