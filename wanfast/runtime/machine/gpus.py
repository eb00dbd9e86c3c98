"""Lists the GPUs that this process may use, with their names, memory and NVLinks.

This module asks NVIDIA's library NVML, and does not import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from wanfast.runtime.machine import host
from wanfast.runtime.machine.once import remembered


@dataclass(frozen=True)
class Gpu:
    """This class describes one GPU, as the driver reports it."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str
    capability: tuple[int, int]
    nvlinks: int  # active


@remembered
def visible_gpus() -> list[Gpu]:
    """Returns the GPUs that this process may use; the list is empty if there is no driver.

    If CUDA_VISIBLE_DEVICES is set, the GPUs come in the order of this variable.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_describe(handle) for handle in _handles()]
    finally:
        pynvml.nvmlShutdown()


def device_ids() -> list[str]:
    """Returns the index or the UUID of each visible GPU, in the form that CUDA_VISIBLE_DEVICES takes."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [item.strip() for item in named.split(",") if item.strip()]
    return [str(index) for index in range(len(visible_gpus()))]


def set_environment() -> None:
    """Sets the environment: CUDA orders the GPUs as the driver does, and torch's allocator uses expandable segments.

    Call this function before this process first uses a GPU; child processes get the settings too. Without expandable
    segments, the denoising loop left 7 GB in fragments that the VAE could not use (one H100, 1168x768, 81 frames). If
    the user has set an option of the allocator, this function does not change it.
    """
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of this setting
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _handles() -> list[object]:
    import pynvml

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = range(pynvml.nvmlDeviceGetCount()) if named is None else [i.strip() for i in named.split(",") if i.strip()]
    handles = []
    for item in ids:
        try:
            by_index = isinstance(item, int) or item.isdigit()
            handles.append(
                pynvml.nvmlDeviceGetHandleByIndex(int(item)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(item)
            )
        except pynvml.NVMLError:
            break  # as in CUDA: an unknown name ends the list
    return handles


def _describe(handle: object) -> Gpu:
    import pynvml

    total, free = _memory(handle)
    return Gpu(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=total,
        free_bytes=free,
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        nvlinks=sum(_link_is_active(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)),
    )


def _memory(handle: object) -> tuple[int, int]:
    """Returns (total, free) bytes; a GPU that shares the host's memory has no figures of its own."""
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        shared = host.memory()
        return shared.total_bytes, shared.free_bytes
    return int(memory.total), int(memory.free)


def _link_is_active(handle: object, link: int) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:
        return False  # no such link


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
