"""Profiles a forward: the shares of attention, linears and everything else in its time, and the time of each kernel.

On a GPU, the profile also has the time in which the GPU only exchanges data with other GPUs, and the time in which no
kernel runs, because the GPU waits for its host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Parts of kernel names. Attention comes first, because its kernels can also match the linears' parts.
GROUPS = {
    "exchanges": ("nccl", "Memcpy PtoP"),
    "attention": ("flash", "fmha", "sdpa", "FlashAttn", "attention"),
    "linears": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "_mm_", "addmm", "mm", "int8_product"),
}


def profile_table(forward: Callable[[], object], device: str, *, quiet: bool = False) -> dict[str, Any]:
    """Profiles one call and prints a table to stderr, unless it is `quiet`.

    Returns {"shares": {group: share of the time}, "kernels": [{"name", "group", "ms", "calls", "share"}, ...]}, with
    the 24 kernels that take most time. On a GPU the result also has "span", in milliseconds: "ms" from the start of the
    first kernel to the end of the last one, "idle_ms" without any kernel, and "only_exchanges_ms" with exchanges only.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        forward()
    events = profiler.key_averages()
    spent = {
        event.key: (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count)
        for event in events
    }
    whole = sum(time for time, _ in spent.values()) or 1
    shares = dict.fromkeys((*GROUPS, "everything else"), 0.0)
    kernels = []
    for name, (microseconds, calls) in sorted(spent.items(), key=lambda item: -item[1][0]):
        shares[group_of(name)] += microseconds / whole
        kernels.append(
            {
                "name": name[:120],
                "group": group_of(name),
                "ms": round(microseconds / 1e3, 3),
                "calls": calls,
                "share": round(microseconds / whole, 4),
            }
        )
    found = {"shares": {group: round(share, 4) for group, share in shares.items()}, "kernels": kernels[:24]}
    found |= {"span": _span(profiler)} if device == "cuda" else {}
    if quiet:
        return found
    for kernel in kernels[:16]:
        print(
            f"  {kernel['share']:7.2%} {kernel['ms']:10.1f} ms {kernel['calls']:5} x {kernel['name'][:90]}",
            file=sys.stderr,
        )
    print(
        "  " + ", ".join(f"{group} {share:.2%}" for group, share in shares.items()), found.get("span"), file=sys.stderr
    )
    return found


def _span(profiler: profile) -> dict[str, float]:
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    times = [(event.time_range.start, event.time_range.end, group_of(event.name)) for event in events]
    whole = max(end for _, end, _ in times) - min(start for start, _, _ in times)
    busy = _covered([(start, end) for start, end, _ in times])
    computing = _covered([(start, end) for start, end, group in times if group != "exchanges"])
    values = {"ms": whole, "idle_ms": whole - busy, "only_exchanges_ms": busy - computing}
    return {name: round(value / 1e3, 3) for name, value in values.items()}


def _covered(times: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(times):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def group_of(kernel: str) -> str:
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts) and not kernel.startswith("triton"):
            return group
    return "everything else"
