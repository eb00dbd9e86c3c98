"""Where the two experts are kept: both on the device, until the VAE wants their room, or one there and both in pinned
host memory.

Only one expert works at a time, and the switch comes once a video, so the idle one need not be on the GPU. The experts
have the same shapes: the device keeps ONE set of parameters, and while the last high-noise forward runs, each block's
weights are overwritten by the other expert's as soon as the block is done. The copy (28.6 GB in bf16, about a second)
hides behind that forward and takes no memory of its own.
Cost: both experts in pinned host memory, 58 GB and up to a tenth more; one copy before a video's first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from wanfast.runtime.config import Expert
from wanfast.runtime.hardware import free_memory
from wanfast.runtime.memory import available_host_bytes
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

    def make_room(self) -> bool:
        """Give back device memory that is held though no expert works, since it does not suffice; False if none is."""
        ...


class ResidentExperts:
    """Both on the device; where that is too small for the VAE beside them, they wait in host memory meanwhile."""

    def __init__(self, experts: dict[Expert, WanDiT], device: str) -> None:
        self._experts, self._device = experts, device
        self._away: set[Expert] = set()

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        if expert in self._away:
            free_memory(self._device)
            _move(self._experts[expert], self._device)
            self._away.remove(expert)
        return self._experts[expert], lambda index: None

    def leave(self) -> None:
        pass

    def make_room(self) -> bool:
        for expert, model in reversed(self._experts.items()):  # a video begins with the first
            if expert not in self._away and not _is_sharded(model) and _bytes(model) <= available_host_bytes():
                _move(model, "cpu")
                self._away.add(expert)
                free_memory(self._device)
                return True
        return False


class SwappedExperts:
    """One on the device. `hosted`: both, filled on the CPU; the first of them becomes the one that moves."""

    def __init__(self, hosted: dict[Expert, WanDiT], device: str) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self._host = {expert: _hosted(model, device) for expert, model in hosted.items()}
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
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
        self._resident = self._arriving = None

    def make_room(self) -> bool:
        return False  # none is on the device but while one works

    def _overwrite(self, expert: Expert, chosen: Callable[[str], bool]) -> None:
        """Queue the copy of the chosen parameters behind all work that is queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # of None: does nothing
            for name, parameter in self._parameters.items():
                if chosen(name):
                    parameter.data.copy_(self._host[expert][name], non_blocking=True)


def _move(model: WanDiT, device: str) -> None:
    with torch.inference_mode(False):  # tensors born in it are others to the compiler, which would compile anew
        model.to(device)


def _bytes(model: WanDiT) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _is_sharded(model: WanDiT) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _hosted(model: WanDiT, device: str) -> dict[str, Tensor]:
    """The parameters in host memory; the model's own are given up one by one, so that there is never a second set.

    Pinned in slabs: torch rounds each pinned tensor up to a power of two, which would take half as much again.
    """
    tensors, slab, used = {}, torch.empty(0, dtype=torch.uint8), 0
    for name, parameter in model.named_parameters():
        size = parameter.nbytes
        if used + size > slab.numel():
            slab, used = torch.empty(max(_SLAB_BYTES, size), dtype=torch.uint8, pin_memory=device == "cuda"), 0
        place = slab[used : used + size].view(parameter.dtype).view(parameter.shape)
        tensors[name] = place.copy_(parameter.data)
        used += -(-size // _ALIGNMENT) * _ALIGNMENT
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return tensors
