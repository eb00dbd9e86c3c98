"""This module places the two experts in memory: they are either resident or offloaded.

Resident: both experts are on the device. Weights are evicted when the VAE needs the memory.

Offloaded: both experts are in pinned host memory, and the device holds the weights of one expert at a time. A video
begins with the high-noise expert, and ends with the low-noise expert. During the last high-noise forward, the low-noise
weights overwrite the weights of each block as soon as the block has run. This copy (28.6 GB in bf16, about a second)
overlaps with the forward and needs no additional GPU memory.
Cost of offloading: 58 to 64 GB of pinned host memory, and one copy of an expert to the device before a video's first
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from wanfast.runtime.device.hardware import free_bytes, free_memory, is_out_of_memory
from wanfast.runtime.distributed.fsdp import is_sharded
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.machine.host import available_host_bytes
from wanfast.runtime.models.dit import WanDiT

AfterBlock = Callable[[int], None]

_SLAB_BYTES, _ALIGNMENT = 1 << 30, 256


class Experts(Protocol):
    """This interface gives the pipeline the expert of each step, wherever the weights are."""

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        """Returns (the expert, ready to run; a function to pass to the expert's forward as `after_block`).

        `blocks`: whether this forward runs the expert's blocks; False if a cached residual replaces them.
        `then`: pass "low_noise" in the last high-noise forward that runs the blocks, and None in all other forwards.
        With "low_noise", `after_block` may overwrite a block that has run: the block then holds the weights of the
        low-noise expert.
        """
        ...

    def release(self) -> None:
        """Frees the GPU memory of offloaded experts until the next `take`; resident experts stay on the device."""
        ...

    def evict(self, size: int) -> bool:
        """Evicts weights of about `size` bytes, or as many as possible; returns whether any weights were evicted.

        This method must not be called while an expert runs.
        """
        ...

    def writable(self, expert: Expert) -> tuple[WanDiT, dict[str, Tensor]]:
        """Returns (the expert, the tensors of the expert's state dict), to overwrite the expert's weights in place.

        Each tensor is on the device or on the host. This method must not be called while an expert runs.
        """
        ...


class ResidentExperts:
    """Holds both experts on the device, and evicts weights to pinned host memory when the VAE needs device memory.

    Only the first eviction of a weight copies the weight to host memory. Later evictions use the same copy, until the
    weight gets new values.
    `may_move`: False disables eviction. Pass False if several ranks replay captured graphs that contain collectives.
    """

    def __init__(self, experts: dict[Expert, WanDiT], device: str, *, may_move: bool = True) -> None:
        # After an eviction, a rank would capture its graphs again while other ranks replay theirs; then the collectives
        # of the ranks would not match. So eviction can be disabled.
        self._experts, self._device, self._may_move = experts, device, may_move
        self._host: dict[nn.Parameter, Tensor] = {}
        self._evicted: set[nn.Parameter] = set()  # the keys of _host that are not on the device

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        model = self._experts[expert]
        if self._evicted and (returning := self._evicted.intersection(model.parameters())):
            free_memory(self._device)
            self._fetch(returning)
        return model, lambda index: None

    def release(self) -> None:
        pass

    def evict(self, size: int) -> bool:
        moved = self._move_to_host(self._needed_last(size)) if self._may_move else 0
        free_memory(self._device)
        return moved > 0

    def writable(self, expert: Expert) -> tuple[WanDiT, dict[str, Tensor]]:
        model, _ = self.take(expert)
        for parameter in model.parameters():
            self._host.pop(parameter, None)  # a copy of the old weights
        return model, model.state_dict()

    def _needed_last(self, size: int) -> list[nn.Parameter]:
        """Returns the last-needed parameters on the device, about `size` bytes, for which the host has memory."""
        chosen, host_bytes = [], available_host_bytes() - _SLAB_BYTES
        for parameter in reversed([parameter for model in self._experts.values() for parameter in model.parameters()]):
            if size <= 0:
                break
            new = 0 if parameter in self._host else parameter.nbytes
            if parameter in self._evicted or is_sharded(parameter) or new > max(0, host_bytes):
                continue
            host_bytes -= new
            size -= parameter.nbytes
            chosen.append(parameter)
        return chosen

    @torch.inference_mode(False)  # the compiler would recompile for inference tensors
    def _fetch(self, parameters: set[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = self._host[parameter].to(self._device, non_blocking=True, copy=True)
        self._evicted -= parameters

    @torch.inference_mode(False)
    def _move_to_host(self, parameters: list[nn.Parameter]) -> int:
        """Evicts the parameters, and returns how many of them are in host memory now."""
        new = [parameter for parameter in parameters if parameter not in self._host]
        for parameter in self._host.keys() & set(parameters):
            _empty(parameter, self._device)
            self._evicted.add(parameter)
        try:
            for parameter, copy in zip(new, _to_host(new, self._device), strict=True):
                self._host[parameter] = copy
                self._evicted.add(parameter)
        except (MemoryError, RuntimeError) as error:
            # A host may have less memory than it reports, as in a container; then the other weights stay.
            if not is_out_of_memory(error, free_bytes(self._device)):
                raise
        return len(self._evicted.intersection(parameters))


class OffloadedExperts:
    """Holds the weights of both experts in host memory; the running expert's weights are also on the device.

    `hosted`: both experts, with weights on the CPU. Their weights have the same shapes, so both experts run in one
    module. When the expert changes, the module's weights on the device are overwritten.
    """

    def __init__(self, hosted: dict[Expert, WanDiT], device: str) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self._host = {
            expert: dict(zip(dict(model.named_parameters()), _to_host(list(model.parameters()), device), strict=True))
            for expert, model in hosted.items()
        }
        self._model = next(iter(hosted.values()))
        self._parameters = dict(self._model.named_parameters())
        self._resident: Expert | None = None  # its weights are on the device
        self._arriving: Expert | None = None  # its blocks are overwriting the resident ones
        self.release()

    def take(self, expert: Expert, then: Expert | None = None, *, blocks: bool = True) -> tuple[WanDiT, AfterBlock]:
        if not blocks and self._resident == expert:
            return self._model, lambda index: None  # its blocks may be overwritten; the layers around them are not
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

        def overwrite_block(index: int) -> None:
            if then is not None:
                self._arriving = then
                self._overwrite(then, lambda name: name.startswith(f"blocks.{index}."))

        return self._model, overwrite_block

    def release(self) -> None:
        for parameter in self._parameters.values():
            _empty(parameter, self._device)
        self._resident = self._arriving = None

    def evict(self, size: int) -> bool:
        return False  # the device holds an expert only while it works

    def writable(self, expert: Expert) -> tuple[WanDiT, dict[str, Tensor]]:
        for name, parameter in self._parameters.items():
            parameter.data = self._host[expert][name]
        held = self._model.state_dict()
        self.release()
        return self._model, held

    def _overwrite(self, expert: Expert, chosen: Callable[[str], bool]) -> None:
        """Queues the copy of the chosen parameters behind all work that is queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # does nothing for None
            for name, parameter in self._parameters.items():
                if chosen(name):
                    parameter.data.copy_(self._host[expert][name], non_blocking=True)


def _to_host(parameters: list[nn.Parameter], device: str) -> Iterator[Tensor]:
    """Yields the parameters' values in host memory and empties each parameter, so that no second set exists.

    The memory is pinned in slabs, because torch rounds each pinned tensor up to a power of two, which takes 50 % more.
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
