"""Where the two experts are kept: both on the device, but for weights that make room for the VAE, or one there and both
in pinned host memory.

Only one expert works at a time, and the switch comes once a video, so the idle one need not be on the GPU. The experts
have the same shapes: the device keeps ONE set of parameters, and while the last high-noise forward runs, each block's
weights are overwritten by the other expert's as soon as the block is done. The copy (28.6 GB in bf16, about a second)
hides behind that forward and takes no memory of its own.
Cost: both experts in pinned host memory, 58 GB and up to a tenth more; one copy before a video's first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wanfast.runtime.device.hardware import free_memory
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.machine.host import available_host_bytes
from wanfast.runtime.models.dit import WanDiT

AfterBlock = Callable[[int], None]

_SLAB_BYTES, _ALIGNMENT = 1 << 30, 256


class Experts(Protocol):
    """What the pipeline asks for."""

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        """The expert, ready, and what its forward must tell of each block.

        `then`: this forward is the last to run the expert's blocks before that one is taken.
        `blocks`: whether this forward runs them, and not only what stands around them.
        """
        ...

    def leave(self) -> None:
        """No expert is needed for now: the decoder wants the memory."""
        ...

    def evict(self, size: int) -> bool:
        """Give back about `size` bytes of the device's, or what can be, since no expert works; False if nothing is."""
        ...


class ResidentExperts:
    """Both on the device; where too little is left for the VAE, as many weights as it takes wait in pinned host memory.

    What was copied there stays, since weights do not change: the next time the device's copy need only be let go of.
    `may_move`: not where ranks replay CUDA graphs of one exchange, which one of them alone would have to record anew.
    """

    def __init__(self, experts: dict[Expert, WanDiT], device: str, *, may_move: bool = True) -> None:
        self._experts, self._device, self._may_move = experts, device, may_move
        self._host: dict[nn.Parameter, Tensor] = {}
        self._away: set[nn.Parameter] = set()  # of those

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        model = self._experts[expert]
        if self._away and (returning := self._away.intersection(model.parameters())):
            free_memory(self._device)
            self._fetch(returning)
        return model, lambda index: None

    def leave(self) -> None:
        pass

    def evict(self, size: int) -> bool:
        moved = self._let_go(self._needed_last(size)) if self._may_move else 0
        free_memory(self._device)
        return moved > 0

    def _needed_last(self, size: int) -> list[nn.Parameter]:
        """Of those that are here, `size` bytes of them, if the host has room for what it does not hold yet."""
        chosen, host_bytes = [], available_host_bytes() - _SLAB_BYTES
        for parameter in reversed([parameter for model in self._experts.values() for parameter in model.parameters()]):
            if size <= 0:
                break
            new = 0 if parameter in self._host else parameter.nbytes
            if parameter in self._away or isinstance(parameter, DTensor) or new > max(0, host_bytes):
                continue
            host_bytes -= new
            size -= parameter.nbytes
            chosen.append(parameter)
        return chosen

    @torch.inference_mode(False)  # tensors born in it are others to the compiler, which would compile anew
    def _fetch(self, parameters: set[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = self._host[parameter].to(self._device, non_blocking=True, copy=True)
        self._away -= parameters

    @torch.inference_mode(False)
    def _let_go(self, parameters: list[nn.Parameter]) -> int:
        """The number of them that are in host memory now."""
        new = [parameter for parameter in parameters if parameter not in self._host]
        for parameter in self._host.keys() & set(parameters):
            _empty(parameter, self._device)
            self._away.add(parameter)
        with suppress(RuntimeError):  # of pinning: a host may have less than it tells, as in a container
            for parameter, copy in zip(new, _to_host(new, self._device), strict=True):
                self._host[parameter] = copy
                self._away.add(parameter)
        return len(self._away.intersection(parameters))


class OffloadedExperts:
    """One on the device. `hosted`: both, filled on the CPU; the first of them becomes the one that moves."""

    def __init__(self, hosted: dict[Expert, WanDiT], device: str) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self._host = {
            expert: dict(zip(dict(model.named_parameters()), _to_host(list(model.parameters()), device), strict=True))
            for expert, model in hosted.items()
        }
        self._model = next(iter(hosted.values()))
        self._parameters = dict(self._model.named_parameters())
        self._resident: Expert | None = None  # whose weights are on the device
        self._arriving: Expert | None = None  # whose blocks are taking their place
        self.leave()

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        if not blocks and self._resident == expert:
            return self._model, lambda index: None  # its blocks may be making way; what stands around them stays
        if self._arriving == expert:
            self._overwrite(expert, lambda name: not name.startswith("blocks."))
        elif self._resident != expert or self._arriving is not None:
            if self._resident is None:
                for name, parameter in self._parameters.items():
                    parameter.data = torch.empty_like(self._host[expert][name], device=self._device)
            self._overwrite(expert, lambda name: True)
        self._resident, self._arriving = expert, None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

        def hand_over(index: int) -> None:
            if then is not None:
                self._arriving = then
                self._overwrite(then, lambda name: name.startswith(f"blocks.{index}."))

        return self._model, hand_over

    def leave(self) -> None:
        for parameter in self._parameters.values():
            _empty(parameter, self._device)
        self._resident = self._arriving = None

    def evict(self, size: int) -> bool:
        return False  # none is on the device but while one works

    def _overwrite(self, expert: Expert, chosen: Callable[[str], bool]) -> None:
        """Queue the copy of the chosen parameters behind all work that is queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # of None: does nothing
            for name, parameter in self._parameters.items():
                if chosen(name):
                    parameter.data.copy_(self._host[expert][name], non_blocking=True)


def _to_host(parameters: list[nn.Parameter], device: str) -> Iterator[Tensor]:
    """Their values in host memory, one by one as each is emptied, so that there is never a second set.

    Pinned in slabs: torch rounds each pinned tensor up to a power of two, which would take half as much again.
    """
    left, slab, used = sum(map(_aligned, parameters)), torch.empty(0, dtype=torch.uint8), 0
    for parameter in parameters:
        size = parameter.nbytes
        if used + size > slab.numel():
            slab_bytes = max(min(_SLAB_BYTES, left), size)
            slab, used = torch.empty(slab_bytes, dtype=torch.uint8, pin_memory=device == "cuda"), 0
        copy = slab[used : used + size].view(parameter.dtype).view(parameter.shape).copy_(parameter.data)
        used, left = used + _aligned(parameter), left - _aligned(parameter)
        _empty(parameter, parameter.device)
        yield copy


def _empty(parameter: nn.Parameter, device: str | torch.device) -> None:
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
