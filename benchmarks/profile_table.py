"""Profiles a forward: the shares of attention, linears and everything else in its time, and the time of each kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Parts of kernel names. Attention comes first, because its kernels can also match the linears' parts.
GROUPS = {
    "attention": ("flash", "fmha", "sdpa", "FlashAttn", "attention"),
    "linears": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "_mm_", "addmm", "mm", "int8_product"),
}


def profile_table(forward: Callable[[], object], device: str) -> dict[str, Any]:
    """Profiles one call and prints a table to stderr.

    Returns {"shares": {group: share of the time}, "kernels": [{"name", "group", "ms", "calls", "share"}, ...]}.
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
    for kernel in kernels[:16]:
        print(
            f"  {kernel['share']:7.2%} {kernel['ms']:10.1f} ms {kernel['calls']:5} x {kernel['name'][:90]}",
            file=sys.stderr,
        )
    print("  " + ", ".join(f"{group} {share:.2%}" for group, share in shares.items()), file=sys.stderr, flush=True)
    return {"shares": {group: round(share, 4) for group, share in shares.items()}, "kernels": kernels[:24]}


def group_of(kernel: str) -> str:
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts) and not kernel.startswith("triton"):
            return group
    return "everything else"
