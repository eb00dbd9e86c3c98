"""Checks a video's tensors for NaN and infinities, and names the first bad tensor, without delaying the device.

The device computes a flag for each tensor. The host reads this flag one step later, when the next tensor is checked. By
then, the work of a whole step is queued on the device, so that the device does not become idle while the host waits.
All ranks check the same tensors in the same order, so that all raise the same error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import NotFiniteError

_FIX = (
    "the weights are finite, so a product or a kernel is wrong: use --attention math without --compile, --quantize and "
    "--magcache, or --precision fp32"
)


def require_finite(where: str, finite: bool) -> None:
    """Raises NotFiniteError if `finite` is False; `where` names the tensor in the error."""
    if not finite:
        raise NotFiniteError(f"{where} holds NaN or an infinity: {_FIX}")


class FiniteWatch:
    """Checks the tensors of one video for NaN and infinities, without waiting for the GPU.

    A bad tensor is reported late: when `look` gets the next tensor, it raises the error. If the last tensor is bad,
    `finish` raises the error.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._before: _Flag | None = None

    def look(self, where: str, x: Tensor) -> None:
        """Queues a check of x; raises NotFiniteError on all ranks if the tensor of the previous call was not finite."""
        flag = _Flag.of(where, x)
        self.finish()
        self._before = flag

    def finish(self) -> None:
        """Raises NotFiniteError on all ranks if the last tensor given to `look` was not finite."""
        before, self._before = self._before, None
        if before is not None and not before.read():
            self._ranks.together(lambda: require_finite(before.where, finite=False))


@dataclass(frozen=True)
class _Flag:
    """Holds a flag that is on its way to the host."""

    where: str
    flag: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, where: str, x: Tensor) -> _Flag:
        flag = all_finite(x)
        if not flag.is_cuda:
            return cls(where, flag, None)
        host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the stream holds the next step too
        arrived.record()
        return cls(where, host, arrived)

    def read(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.flag)
