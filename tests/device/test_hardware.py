from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wanfast.runtime.device import hardware
from wanfast.runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.mark.parametrize(
    ("precision", "tf32", "convolutions", "products"),
    [
        ("bf16", None, True, False),
        ("fp32", None, False, False),
        ("fp32", True, True, True),
        ("bf16", False, False, False),
    ],
)
def test_tf32_is_as_asked_and_as_the_reference_has_it_otherwise(
    precision: str, tf32: bool | None, convolutions: bool, products: bool
) -> None:
    hardware.prepare("cpu", precision, tf32)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (convolutions, products)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device cuda: torch .* sees no GPU"):
        hardware.prepare("cuda", "bf16", None)


class AcceleratorError(RuntimeError):
    """Stands for torch's error of a CUDA call."""

    error_code = 2


@pytest.mark.parametrize(
    ("error", "free", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 60 << 30, True),
        (AcceleratorError("CUDA error"), 60 << 30, True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 1 << 30, True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 60 << 30, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 60 << 30, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 60 << 30, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 60 << 30, True),
        (RuntimeError("CUDA error: out of memory"), 60 << 30, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 60 << 30, True),
        (RuntimeError("CUDA driver error: out of memory"), 60 << 30, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), 1 << 30, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), 60 << 30, False),
        (MemoryError(), 60 << 30, True),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"), 1 << 30, False),
        (NotImplementedError("out of memory"), 1 << 30, False),  # a subclass of RuntimeError
    ],
)
def test_memory_ran_out_by_class_words_and_state(error: MemoryError | RuntimeError, free: int, expected: bool) -> None:
    assert hardware.is_out_of_memory(error, free) == expected


def test_the_allocator_of_a_cpu_says_what_is_known_of_it() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert hardware.is_out_of_memory(error.value, 60 << 30)


def test_the_memory_of_a_cpu_is_never_scarce() -> None:
    no_engine = RuntimeError("GET was unable to find an engine to execute this computation")
    assert not hardware.is_out_of_memory(no_engine, hardware.free_bytes("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["Python", "cuBLAS", "CPU", "torch"],
)
def test_every_lack_of_memory_is_one_error(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError), hardware.one_out_of_memory_error():
        raise error


def test_another_error_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, hardware.one_out_of_memory_error():
        raise RuntimeError("the shapes do not match")
    assert type(caught.value) is RuntimeError
