"""Where the two experts are kept: both on the device, but for blocks that make room for the VAE, or one there and both
in pinned host memory.

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
from torch import Tensor, nn
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

    def make_room(self, size: int) -> bool:
        """Give back `size` bytes of the device's, if as many are held though no expert works; False if none are."""
        ...


class ResidentExperts:
    """Both on the device; where too little is left for the VAE, as many blocks as it takes wait in pinned host memory.

    What was copied there stays, since weights do not change: the next time the device's copy need only be let go of.
    """

    def __init__(self, experts: dict[Expert, WanDiT], device: str) -> None:
        self._experts, self._device = experts, device
        self._host: dict[nn.Module, dict[str, Tensor]] = {}
        self._away: set[nn.Module] = set()  # of those blocks

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        model = self._experts[expert]
        if returning := [block for block in model.blocks if block in self._away]:
            free_memory(self._device)
            self._fetch(returning)
        return model, lambda index: None

    def leave(self) -> None:
        pass

    def make_room(self, size: int) -> bool:
        freed = 0
        for block in reversed([block for model in self._experts.values() for block in model.blocks]):  # needed last
            if freed < size and block not in self._away and self._let_go(block):
                freed += sum(tensor.nbytes for tensor in self._host[block].values())
        free_memory(self._device)
        return freed > 0

    @torch.inference_mode(False)  # tensors born in it are others to the compiler, which would compile anew
    def _fetch(self, blocks: list[nn.Module]) -> None:
        for block in blocks:
            for name, parameter in block.named_parameters():
                parameter.data = self._host[block][name].to(self._device, non_blocking=True, copy=True)
            self._away.remove(block)

    @torch.inference_mode(False)
    def _let_go(self, block: nn.Module) -> bool:
        """False if it cannot."""
        if block not in self._host:
            parameters = list(block.parameters())
            size = sum(parameter.nbytes for parameter in parameters)
            if any(isinstance(parameter, DTensor) for parameter in parameters) or 2 * size > available_host_bytes():
                return False  # twice: torch may round what it pins up to a power of two
            self._host[block] = _hosted(block, self._device)
        else:
            _empty(block, self._device)
        self._away.add(block)
        return True


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
        _empty(self._model, self._device)
        self._resident = self._arriving = None

    def make_room(self, size: int) -> bool:
        return False  # none is on the device but while one works

    def _overwrite(self, expert: Expert, chosen: Callable[[str], bool]) -> None:
        """Queue the copy of the chosen parameters behind all work that is queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # of None: does nothing
            for name, parameter in self._parameters.items():
                if chosen(name):
                    parameter.data.copy_(self._host[expert][name], non_blocking=True)


def _empty(module: nn.Module, device: str) -> None:
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)


def _hosted(module: nn.Module, device: str) -> dict[str, Tensor]:
    """The parameters in host memory; the module's own are given up one by one, so that there is never a second set.

    Pinned in slabs: torch rounds each pinned tensor up to a power of two, which would take half as much again.
    """
    left = sum(map(_aligned, module.parameters()))
    tensors, slab, used = {}, torch.empty(0, dtype=torch.uint8), 0
    for name, parameter in module.named_parameters():
        size = parameter.nbytes
        if used + size > slab.numel():
            slab_bytes = max(min(_SLAB_BYTES, left), size)
            slab, used = torch.empty(slab_bytes, dtype=torch.uint8, pin_memory=device == "cuda"), 0
        place = slab[used : used + size].view(parameter.dtype).view(parameter.shape)
        tensors[name] = place.copy_(parameter.data)
        used += _aligned(parameter)
        left -= _aligned(parameter)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return tensors


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
