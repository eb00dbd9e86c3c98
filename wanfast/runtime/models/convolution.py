"""Convolves channels-last clips and adds the bias; on a GPU, by the fastest cuDNN engine for each shape.

An engine is one of the kernels that cuDNN's front end offers for a convolution. When a shape is first used, this module
times each engine on tensors of this shape, and chooses the fastest one. For the VAE's shapes on Hopper, the fastest
engine needs half the time of the engine that torch chooses. The engine also adds the bias, and rounds once; torch adds
the bias in a separate pass. Three kinds of engines are left out: those that are not deterministic, those that compile
at run time (seconds each), and those that need more than 256 MiB of workspace.

Engines sum in different orders, so another engine may change the last bits. To get the same bits again, store
`chosen()` and pass it to `choose()` in the next process. torch's own convolution is used in each of these cases: on a
CPU; for float32 without TF32; if gradients are enabled; if the front end is not installed; if the front end offers no
engine.

Shapes: B batch, C channels, T frames, h w any grid; the memory of a clip is [B, T, h, w, C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.device.hardware import free_bytes, is_out_of_memory

HAS_FRONT_END = torch.version.cuda is not None and find_spec("cudnn") is not None
Triple: TypeAlias = tuple[int, int, int]

_ALIGNED_BYTES = 16  # of a position's channels; engines copy what has fewer
_RUNS = 3  # of each engine in a search; the fastest run counts
_HOPELESS = 1.5  # an engine this much slower than the best so far runs only once
_MOST_WORKSPACE_BYTES = 256 << 20
_MOST_GRAPHS = 1024  # that a process holds; a video size needs about 40


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, stride: Triple = (1, 1, 1), padding: Triple) -> Tensor:
    """Returns the convolution of x [B,C,T,h,w] with `weight` [C',C,kt,kh,kw], plus `bias` [C'].

    `x` may have more channels than `weight`; the additional channels must be zeros.
    """
    if x.is_cuda and HAS_FRONT_END and not torch.is_grad_enabled() and _may_use_tensor_cores(x.dtype):
        return _by_cudnn(x, weight, bias, stride, padding)
    return _by_torch(x, weight, bias, stride, padding)


def padded_channels(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many channels to allocate for an input of `channels` channels, so that `convolve` is fast.

    On a GPU with cuDNN's front end, `channels` is rounded up, so that the channels of one position take a multiple of
    16 bytes; the additional channels must be zeros. Otherwise the result is `channels`.
    """
    if device.type != "cuda" or not HAS_FRONT_END:
        return channels
    aligned = _ALIGNED_BYTES // dtype.itemsize
    return -(-channels // aligned) * aligned


def chosen() -> dict[str, str]:
    """Returns {shape: engine} of all shapes for which this process found an engine or got one from `choose`.

    The engine "torch" means that cuDNN's front end has no engine for the shape, so that torch convolves.
    """
    return dict(_chosen)


def used() -> dict[str, str]:
    """Returns {shape: engine} of the convolutions that ran since the last call of `forget_uses`."""
    return {problem.name: _chosen[problem.name] for problem in _used}


def forget_uses() -> None:
    _used.clear()


def choose(engines: Mapping[str, str]) -> None:
    """Makes this process use the engines in `engines`, a {shape: engine} that `chosen` returned.

    If this process has already chosen an engine for one of these shapes, the new engine replaces it.
    """
    changed = {shape for shape, name in engines.items() if _chosen.get(shape, name) != name}
    _chosen.update(engines)
    for problem in [each for each in _graphs if each.name in changed]:
        del _graphs[problem]


def _may_use_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 or bool(torch.backends.cudnn.allow_tf32)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """Calls oneDNN on a CPU, because torch takes a slow path for one small clip (8 times slower at 16 channels)."""
    x = x[:, : weight.shape[1]]
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    if x.device.type == "cpu" and has_onednn():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


@dataclass(frozen=True)
class _Problem:
    """Describes a convolution: all that decides which engines can compute it, and how fast they are."""

    device: int
    dtype: torch.dtype
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: Triple
    padding: Triple

    @property
    def name(self) -> str:
        sizes = (self.x, self.weight, self.stride, self.padding)
        x, weight, stride, padding = ("x".join(map(str, each)) for each in sizes)
        return f"{str(self.dtype).removeprefix('torch.')} {x} by {weight}, stride {stride}, padding {padding}"

    @property
    def out(self) -> tuple[int, ...]:
        sizes = zip(self.x[2:], self.weight[2:], self.stride, self.padding, strict=True)
        grid = ((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)
        return self.x[0], self.weight[0], *grid


@dataclass(frozen=True)
class _Graph:
    """Holds a convolution that cuDNN can run: graph, tensors by role, and the engine with its workspace."""

    graph: Any
    roles: dict[str, Any]
    engine: int
    workspace_bytes: int

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        device = tensors["x"].device
        workspace = torch.empty(max(1, self.workspace_bytes), dtype=torch.uint8, device=device)
        pack = {self.roles[role]: tensor for role, tensor in tensors.items()}
        self.graph.execute_plan_at_index(pack, workspace, self.engine, _handle(device))


_chosen: dict[str, str] = {}  # a problem's name -> the name that cuDNN gives the engine; "torch" if there is none
_graphs: dict[_Problem, _Graph | None] = {}  # None: torch convolves
_handles: dict[torch.device, Any] = {}
_used: set[_Problem] = set()
_TORCH = "torch"


def _by_cudnn(x: Tensor, weight: Tensor, bias: Tensor, stride: Triple, padding: Triple) -> Tensor:
    outputs, layout = weight.shape[0], torch.channels_last_3d
    x, (weight, bias) = x.contiguous(memory_format=layout), _aligned(weight, bias, x.shape[1])
    problem = _Problem(x.device.index, x.dtype, tuple(x.shape), tuple(weight.shape), stride, padding)
    out = torch.empty(problem.out, dtype=x.dtype, device=x.device, memory_format=layout)
    tensors = {"x": x, "weight": weight, "bias": bias, "out": out}
    if problem not in _graphs:
        if len(_graphs) >= _MOST_GRAPHS:
            _graphs.clear()  # `_chosen` still names their engines
        _graphs[problem] = _search(problem, tensors)
    _used.add(problem)
    graph = _graphs[problem]
    if graph is None:
        return _by_torch(x, weight, bias, stride, padding)[:, :outputs]
    graph.run(tensors)
    return out[:, :outputs]


def _aligned(weight: Tensor, bias: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Pads a weight to `inputs` channels, and its outputs so that no engine copies the result."""
    outputs = padded_channels(weight.shape[0], weight.dtype, weight.device) - weight.shape[0]
    missing = inputs - weight.shape[1]
    if outputs or missing:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing, 0, outputs))
        bias = F.pad(bias, (0, outputs))
    return weight.contiguous(memory_format=torch.channels_last_3d), bias


def _search(problem: _Problem, tensors: Mapping[str, Tensor]) -> _Graph | None:
    """Returns the graph with the engine that was chosen before, else with the fastest one, which is then chosen.

    Returns None if no engine can do it.
    """
    before, device = _chosen.get(problem.name), tensors["x"].device.type
    if before == _TORCH:
        return None
    engines: dict[str, int] = {}
    with _left_out(device):
        graph, roles = _build(problem)
        engines = {graph.get_plan_name_at_index(index): index for index in range(graph.get_execution_plan_count())}
    if before in engines:
        return _with_engine(graph, roles, engines[before])
    best: tuple[float, str, _Graph] | None = None
    for name, index in engines.items():
        with _left_out(device):
            tried = _with_engine(graph, roles, index)
            tried.run(tensors)  # the first run loads the kernel
            seconds = _seconds(tried, tensors)
            if best is None or seconds < _HOPELESS * best[0]:
                seconds = min(seconds, *(_seconds(tried, tensors) for _ in range(_RUNS - 1)))
            if best is None or seconds < best[0]:
                best = seconds, name, tried
    _chosen[problem.name] = best[1] if best else _TORCH
    return best[2] if best else None


@contextmanager
def _left_out(device: str) -> Iterator[None]:
    """Suppresses the error of an engine that cannot compute a graph, or of a graph that no engine can compute.

    An error of the device is raised: if memory ran out, the caller evicts weights, and the search begins again.
    """
    import cudnn

    try:
        yield
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        if _is_of_the_device(error, device):
            raise


def _is_of_the_device(error: Exception, device: str) -> bool:
    """Returns whether an error is not the engine's: memory ran out, or the device failed."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and is_out_of_memory(error, free_bytes(device))


def _with_engine(graph: Any, roles: dict[str, Any], index: int) -> _Graph:
    graph.build_plan_at_index(index)
    return _Graph(graph, roles, index, graph.get_workspace_size_plan_at_index(index))


def _seconds(graph: _Graph, tensors: Mapping[str, Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.run(tensors)
    end.record()
    end.synchronize()
    return cast(float, start.elapsed_time(end)) / 1e3


def _build(problem: _Problem) -> tuple[Any, dict[str, Any]]:
    """Returns a graph with its candidate engines, and its tensors by role."""
    import cudnn

    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float32: cudnn.data_type.FLOAT}[problem.dtype]
    sums = cudnn.data_type.FLOAT
    handle = _handle(torch.device("cuda", problem.device))
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=sums, compute_data_type=sums, handle=handle)

    def tensor(role: str, sizes: tuple[int, ...]) -> Any:
        return graph.tensor(name=role, dim=list(sizes), stride=_strides(sizes), data_type=kind)

    roles = {
        "x": tensor("x", problem.x),
        "weight": tensor("weight", problem.weight),
        "bias": tensor("bias", (1, problem.weight[0], 1, 1, 1)),
    }
    stride, padding, dilation = list(problem.stride), list(problem.padding), [1, 1, 1]
    product = graph.conv_fprop(
        image=roles["x"], weight=roles["weight"], padding=padding, stride=stride, dilation=dilation
    )
    product.set_data_type(sums)
    out = roles["out"] = graph.bias(name="out", input=product, bias=roles["bias"])
    out.set_output(True).set_data_type(kind).set_dim(list(problem.out)).set_stride(_strides(problem.out))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])  # not the fallback engines, which run for seconds
    graph.deselect_numeric_notes([cudnn.numerical_note.NONDETERMINISTIC])
    graph.deselect_behavior_notes([cudnn.behavior_note.RUNTIME_COMPILATION])
    graph.deselect_workspace_greater_than(_MOST_WORKSPACE_BYTES)
    graph.check_support()
    return graph, roles


def _strides(sizes: tuple[int, ...]) -> list[int]:
    """Returns the strides of a channels-last clip; torch may state others for a dimension of one."""
    _, channels, frames, height, width = sizes
    return [frames * height * width * channels, 1, height * width * channels, width * channels, channels]


def _handle(device: torch.device) -> Any:
    """Returns this device's handle, which runs on torch's current stream."""
    import cudnn

    handle = _handles.get(device)
    if handle is None:
        with torch.cuda.device(device):
            handle = _handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle
