"""This module copies tensors of memory-mapped files to a GPU: threads fill pinned buffers, from which the GPU copies.

A mapped tensor is read from its file when it is copied. One thread reads 5 to 8 GB/s from the page cache, but the link
to a GPU can carry 50 GB/s from pinned memory. So several threads read pieces of the tensors at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

T = TypeVar("T")
PIECE_BYTES = 16 << 20  # of a pinned buffer; smaller pieces cost more calls, larger ones more time to pin
_AHEAD_BYTES = 512 << 20  # of tensors that are read before they are asked for
_MOST_THREADS = 8  # more threads gained little: the memory of the host is busy


def to_device(tensors: Iterable[tuple[T, Tensor]], device: str, cores: int) -> Iterator[tuple[T, Tensor]]:
    """Copies each CPU tensor to `device` and yields (label, tensor), in order, while threads read the next tensors.

    `cores`: how many CPU cores this rank may use. There is one thread for each core, but at most 8. Work on the current
    stream may use a yielded tensor at once. If `device` is a CPU, the tensors are yielded as they are.
    """
    if not device.startswith("cuda"):
        yield from tensors
        return
    stage, copies, ahead = _Stage(device, max(1, min(cores, _MOST_THREADS))), deque[tuple[T, _Copy]](), 0
    try:
        for label, tensor in tensors:
            copies.append((label, stage.begin(tensor)))
            ahead += tensor.nbytes
            while ahead > _AHEAD_BYTES:
                first, copy = copies.popleft()
                ahead -= copy.target.nbytes
                yield first, stage.end(copy)
        while copies:
            first, copy = copies.popleft()
            yield first, stage.end(copy)
    finally:
        stage.close()


@dataclass(frozen=True)
class _Copy:
    """Describes a copy to the device, and its pieces, on which threads work."""

    target: Tensor
    pieces: list[Future[None]]


class _Stage:
    """Holds two pinned buffers for each thread, and the stream on which the GPU copies them."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(threads)
        self._buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = (
            SimpleQueue()
        )  # each with the end of its last copy
        for _ in range(2 * threads):
            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._buffers.put((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def begin(self, source: Tensor) -> _Copy:
        """Starts to copy the tensor `source` to the device; `end` returns the tensor on the device."""
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream())  # which may still use the memory of `target`
        read, written = source.reshape(-1).view(torch.uint8).numpy(), target.view(-1).view(torch.uint8)
        pieces = [slice(first, first + PIECE_BYTES) for first in range(0, len(read), PIECE_BYTES)]
        return _Copy(target, [self._threads.submit(self._copy, read[piece], written[piece]) for piece in pieces])

    def end(self, copy: _Copy) -> Tensor:
        """Returns the tensor on the device; later work on the current stream waits for the copy."""
        for piece in copy.pieces:
            piece.result()
        torch.cuda.current_stream().wait_stream(self._stream)
        return copy.target

    @torch.inference_mode()  # threads do not inherit it, and only in it they may write into tensors that began in it
    def _copy(self, source: npt.NDArray[np.uint8], target: Tensor) -> None:
        buffer, emptied = self._buffers.get()
        try:
            emptied.synchronize()
            np.copyto(buffer.numpy()[: len(source)], source)  # on this thread alone, unlike a copy of torch
            with torch.cuda.stream(self._stream):
                target.copy_(buffer[: len(source)], non_blocking=True)
                emptied.record()
        finally:
            self._buffers.put((buffer, emptied))

    def close(self) -> None:
        """Ends the threads; copies that have not begun are dropped."""
        self._threads.shutdown(cancel_futures=True)
        self._stream.synchronize()  # the buffers go back to torch, which may give them to others
