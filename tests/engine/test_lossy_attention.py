"""Tests that every name of lossy attention has its class and its probe, and that a name without one is not exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import attention_probe, loading
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.facts.choices import LOSSY_ATTENTION, Attention
from wanfast.runtime.models import attention_kernels

NEW: Any = "new-lossy"


def attention_of(kernel: Attention) -> LossyAttention | None:
    return loading.lossy_attention(kernel, attention_kernels.KERNELS["math"].run, 4, Ranks("cpu"))


@pytest.mark.parametrize("kernel", LOSSY_ATTENTION)
def test_a_lossy_kernel_has_a_class_and_a_probe(kernel: Attention) -> None:
    assert isinstance(attention_of(kernel), LossyAttention)
    assert attention_probe.probe(kernel, "cpu").state == "runs"


def test_an_exact_kernel_has_no_class() -> None:
    assert attention_of("auto") is attention_of("math") is attention_of("fa3") is None


def test_a_lossy_kernel_without_a_class_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOSSY_ATTENTION", (*LOSSY_ATTENTION, NEW))
    with pytest.raises(AssertionError, match="no class computes lossy attention by new-lossy"):
        attention_of(NEW)


def test_a_package_may_have_only_a_lossy_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = attention_probe._LOSSY["fa3-fp8"]
    monkeypatch.setattr(attention_probe, "LOSSY_ATTENTION", (*LOSSY_ATTENTION, NEW))
    monkeypatch.setitem(attention_probe._LOSSY, NEW, probed)
    monkeypatch.setitem(attention_probe.ATTENTION_PACKAGES, NEW, ("new-package", ("new_package.interface",), "new"))
    assert attention_probe.probe(NEW, "cpu", torch.float32).state == "runs"  # a CPU computes the emulation
    found = attention_probe.probe(NEW, "cuda")
    assert (found.state, found.reason) == ("not installed", "pip install 'wanfast[new]'")
