"""The GPUs that this process may use, by NVIDIA's management library: names, memory, links. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str
    capability: tuple[int, int]
    nvlinks: int  # active


def visible_gpus() -> list[Gpu]:
    """In the order of CUDA_VISIBLE_DEVICES, if it is set; none where there is no driver."""
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
    """What CUDA_VISIBLE_DEVICES may hold for each of `visible_gpus`."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [item.strip() for item in named.split(",") if item.strip()]
    return [str(index) for index in range(len(visible_gpus()))]


def expand_segments() -> None:
    """Torch's allocator, of this process before its first use of a GPU and of its children, so that few gaps are left.

    In gaps that the loop left 7 GB were lost to the VAE (one H100, 1168x768x81). What a user set stays.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the same, by its name of old
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
            break  # as CUDA does: nothing after a name that is not there
    return handles


def _describe(handle: object) -> Gpu:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        nvlinks=sum(_link_is_active(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)),
    )


def _link_is_active(handle: object, link: int) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:
        return False  # no such link


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
