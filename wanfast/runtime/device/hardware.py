"""This module sets up and describes a process's device, measures its memory and detects out-of-memory errors."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.machine import host

_CUDA_ALLOCATION_FAILED = 2  # cudaErrorMemoryAllocation
# What torch's allocator of a CPU, CUDA, cuBLAS and cuDNN say if they get no memory, in errors of no class of their own.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "out of memory",  # of CUDA, its driver and Triton
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
# They say this if they get no memory, and also for other reasons.
_PERHAPS_NO_MEMORY = (
    "unable to find an engine to execute this computation",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
)
_SCARCE_BYTES = 4 << 30  # three times the largest tensor of a decoder at 1280x720; at most 1.9 GiB were left in tests


def prepare(device: str, precision: str, tf32: bool | None) -> None:
    """Checks that torch can use `device`, and sets whether a GPU may use TF32 for float32 operations.

    `tf32` is True (--tf32), False (--no-tf32) or None (neither). True and False apply to matrix products and to
    convolutions. None means: matrix products may not use TF32; convolutions may use it if `precision` is "bf16", as in
    the reference, but not if it is "fp32".
    Raises ConfigError if torch cannot use the device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} sees no GPU: use --device cpu, or install a CUDA build of torch"
        )
    torch.backends.cudnn.allow_tf32 = precision == "bf16" if tf32 is None else tf32
    torch.backends.cuda.matmul.allow_tf32 = bool(tf32)


def use_few_threads(device: str, dim: int) -> None:
    """Limits torch's CPU threads, because too many threads slow a model.

    `dim`: the model's width. A model with a width below 1024 gets one thread, because its matrix products are short.
    Any other model gets at most one thread for each usable core, because more threads would wait for each other. On a
    GPU, or if OMP_NUM_THREADS is set, nothing changes.
    """
    if device == "cpu" and host.THREADS not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), host.own_threads(dim)))


def describe(device: str) -> dict[str, str]:
    """Returns a description of the device for the JSON of a run.

    For a GPU, the description holds the name, the capability, the CUDA version and the TF32 settings. For a CPU, the
    description holds the name and the number of threads.
    """
    if device != "cuda":
        return {"device": platform.processor() or platform.machine(), "threads": str(torch.get_num_threads())}
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cudnn_tf32": str(torch.backends.cudnn.allow_tf32),
        "matmul_tf32": str(torch.backends.cuda.matmul.allow_tf32),
    }


@contextmanager
def one_out_of_memory_error() -> Iterator[None]:
    """Converts out-of-memory errors of the `with` block to torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]
        if not is_out_of_memory(error, free_bytes(device)):
            raise
        raise torch.OutOfMemoryError(str(error) or "MemoryError") from error


def is_out_of_memory(error: MemoryError | RuntimeError, free: int) -> bool:
    """Returns whether an error means that memory ran out; `free` is the number of free bytes on the device.

    The answer is True for MemoryError, for torch.OutOfMemoryError, and for CUDA's code of a failed allocation. For a
    plain RuntimeError, the error's text decides. A text such as "CUDNN_STATUS_NOT_INITIALIZED" has other causes too, so
    the answer is True only if `free` is less than 4 GiB.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if getattr(error, "error_code", None) == _CUDA_ALLOCATION_FAILED:
        return True
    if type(error) is not RuntimeError:
        return False
    words = str(error)
    return any(each in words for each in _NO_MEMORY) or (
        free < _SCARCE_BYTES and any(each in words for each in _PERHAPS_NO_MEMORY)
    )


def free_bytes(device: str) -> int:
    """Returns the bytes that this process can still allocate on the GPU; for a CPU, returns sys.maxsize."""
    if device != "cuda":
        return sys.maxsize
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def free_memory(device: str) -> None:
    """Frees unused memory: collects garbage (sharded modules are reference cycles), and empties torch's GPU cache.

    Collecting takes tenths of a second while models are loaded, and the GPU waits meanwhile.
    """
    gc.collect()
    empty_cache(device)


def empty_cache(device: str) -> None:
    """Gives the unused blocks of torch's GPU cache back to the GPU; for a CPU, nothing happens."""
    if device == "cuda":
        torch.cuda.empty_cache()


def forget_cuda_graphs() -> None:
    """Frees all CUDA graphs that torch.compile captured.

    The next forward recompiles the code, or loads it from the compiler caches.
    """
    if "torch._inductor.cudagraph_trees" in sys.modules:
        torch.compiler.reset()


def reset_peak_memory(device: str) -> None:
    """Resets the peak of GPU memory; for a CPU nothing happens, because a process cannot reset its peak memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(device: str) -> int:
    """Returns this process's peak memory in bytes.

    On a GPU, only the memory of torch's tensors counts. On a CPU, the process's resident set counts.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
