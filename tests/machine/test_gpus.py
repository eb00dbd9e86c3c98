from __future__ import annotations

import os
from types import SimpleNamespace

import pynvml
import pytest

from wanfast.runtime.machine import gpus, host


def not_supported(*_: object) -> None:
    raise pynvml.NVMLError_NotSupported


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a driver that shows one GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answers: dict[str, object] = {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "gpu",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85, free=84), "nvmlDeviceGetName": "NVIDIA H100",
        "nvmlSystemGetDriverVersion": b"580", "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetNvLinkState": 1,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)


def test_a_gpu_is_described(driver: None) -> None:
    (found,) = gpus.visible_gpus()
    assert (found.name, found.total_bytes, found.free_bytes, found.driver) == ("NVIDIA H100", 85, 84, "580")


def test_a_gpu_that_shares_the_hosts_memory_has_the_hosts_figures(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    monkeypatch.setattr(host, "memory", lambda: host.HostMemory(128, 100, is_limited=False))
    (found,) = gpus.visible_gpus()
    assert (found.total_bytes, found.free_bytes) == (128, 100)


def test_one_rank_numbers_gpus_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "own"})
    gpus.set_environment()
    assert os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "own", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
