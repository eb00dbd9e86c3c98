"""Tests how the engine of a convolution is chosen, with a front end that stands in for cuDNN's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime.models import convolution

LAYOUT = torch.channels_last_3d


class FrontEnd:
    """Stands in for the graphs of cuDNN: engines by name, with the seconds that each takes."""

    def __init__(self, **seconds: float | type[Exception]) -> None:
        self.seconds = seconds
        self.runs: list[str] = []

    def build(self, problem: object) -> tuple[Any, dict[str, Any]]:
        return self, {role: role for role in ("x", "weight", "bias", "out")}

    def get_execution_plan_count(self) -> int:
        return len(self.seconds)

    def get_plan_name_at_index(self, index: int) -> str:
        return list(self.seconds)[index]

    def build_plan_at_index(self, index: int) -> None:
        kind = self.seconds[self.get_plan_name_at_index(index)]
        if isinstance(kind, type):
            raise kind("left out")

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 16

    def execute_plan_at_index(self, pack: dict[str, Tensor], workspace: Tensor, index: int, handle: object) -> None:
        self.runs.append(self.get_plan_name_at_index(index))
        pack["out"].copy_(F.conv3d(pack["x"], pack["weight"], pack["bias"], padding=(0, 1, 1)))


class NotSupportedError(Exception):
    """Stands in for cuDNN's own class."""


@pytest.fixture(autouse=True)
def _front_end_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(cudnnGraphNotSupportedError=NotSupportedError))
    monkeypatch.setattr(convolution, "_chosen", {})
    monkeypatch.setattr(convolution, "_graphs", {})
    monkeypatch.setattr(convolution, "_used", set())
    monkeypatch.setattr(convolution, "_handle", lambda device: None)


def convolve_by(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch, width: int = 7) -> Tensor:
    """Convolves as on a GPU, by the engines of `front_end`; returns the difference from torch's result."""
    monkeypatch.setattr(convolution, "_build", front_end.build)
    monkeypatch.setattr(convolution, "_seconds", lambda graph, tensors: front_end.seconds[front_end.runs[-1]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 4, 5, 6, width), generator=generator)
    weight = torch.randn((3, 4, 3, 3, 3), generator=generator)
    bias = torch.randn(3, generator=generator)
    got = convolution._by_cudnn(x.contiguous(memory_format=LAYOUT), weight, bias, (1, 1, 1), (0, 1, 1))
    assert got.shape == (1, 3, 3, 6, width)
    return (got - F.conv3d(x, weight, bias, padding=(0, 1, 1))).abs().max()


def test_the_fastest_engine_is_searched_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    front_end = FrontEnd(first=3.0, left_out=NotSupportedError, broken=RuntimeError, best=1.0, slow=9.0)
    assert convolve_by(front_end, monkeypatch) < 1e-5
    assert list(convolution.chosen().values()) == ["best"] and front_end.runs[-1] == "best"
    assert convolution.used() == convolution.chosen()
    convolution.forget_uses()
    assert convolution.used() == {}
    assert front_end.runs.count("slow") == 1  # hopeless, so not run again
    front_end.runs.clear()
    convolve_by(front_end, monkeypatch)
    assert front_end.runs == ["best"]


def test_graphs_of_many_shapes_are_freed_and_their_engines_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_MOST_GRAPHS", 3)
    front_end = FrontEnd(first=3.0, best=1.0)
    for width in range(3, 13):
        assert convolve_by(front_end, monkeypatch, width) < 1e-5
        assert len(convolution._graphs) <= 3
    assert list(convolution.chosen().values()) == ["best"] * 10
    front_end.runs.clear()
    convolve_by(front_end, monkeypatch, 3)
    assert front_end.runs == ["best"]  # built again without a search


def test_a_given_choice_is_taken_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    front_end = FrontEnd(first=3.0, best=1.0)
    convolve_by(front_end, monkeypatch)
    (shape,) = convolution.chosen()
    monkeypatch.setattr(convolution, "_chosen", {})
    monkeypatch.setattr(convolution, "_graphs", {})
    front_end.runs.clear()
    convolution.choose({shape: "first"})
    convolve_by(front_end, monkeypatch)
    assert front_end.runs == ["first"] and convolution.chosen() == {shape: "first"}
    convolution.choose({shape: "best"})  # of another rank group, whose engines were stored first
    convolve_by(front_end, monkeypatch)
    assert front_end.runs == ["first", "best"] and convolution.chosen() == {shape: "best"}


def test_an_engine_that_is_gone_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    front_end = FrontEnd(first=3.0, best=1.0)
    convolve_by(front_end, monkeypatch)
    (shape,) = convolution.chosen()
    monkeypatch.setattr(convolution, "_chosen", {shape: "of an older cuDNN"})
    monkeypatch.setattr(convolution, "_graphs", {})
    convolve_by(front_end, monkeypatch)
    assert convolution.chosen() == {shape: "best"}


def test_torch_convolves_where_no_engine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert convolve_by(FrontEnd(left_out=NotSupportedError), monkeypatch) < 1e-5
    assert list(convolution.chosen().values()) == ["torch"]


@pytest.mark.parametrize("kind", [NotSupportedError, RuntimeError])
def test_torch_convolves_where_every_engine_was_left_out(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Then cuDNN's front end raises while it builds the graph; it is asked once."""
    asked = []

    def building(problem: object) -> None:
        asked.append(problem)
        raise kind("no execution plans finalized successfully")

    front_end = FrontEnd()
    monkeypatch.setattr(front_end, "build", building)
    assert convolve_by(front_end, monkeypatch) < 1e-5
    assert list(convolution.chosen().values()) == ["torch"]
    convolution._graphs.clear()  # as in a process that was given this choice
    assert convolve_by(front_end, monkeypatch) < 1e-5 and len(asked) == 1


def test_a_graph_without_memory_is_not_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def building(problem: object) -> None:
        raise torch.OutOfMemoryError("of the workspace")

    front_end = FrontEnd()
    monkeypatch.setattr(front_end, "build", building)
    with pytest.raises(torch.OutOfMemoryError):
        convolve_by(front_end, monkeypatch)
    assert convolution.chosen() == {}


def test_a_search_without_memory_is_not_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        convolve_by(FrontEnd(first=torch.OutOfMemoryError, best=1.0), monkeypatch)
    assert convolution.chosen() == {}


def test_an_error_of_the_device_is_not_an_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower engine would be stored for good."""

    def failing(index: int) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    front_end = FrontEnd(first=3.0, best=1.0)
    monkeypatch.setattr(front_end, "build_plan_at_index", failing)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        convolve_by(front_end, monkeypatch)
    assert convolution.chosen() == {}


def test_channels_are_padded_to_what_tensor_cores_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "HAS_FRONT_END", True)
    gpu = torch.device("cuda")
    sizes = [(3, torch.float32), (3, torch.bfloat16), (96, torch.bfloat16)]
    assert [convolution.padded_channels(size, dtype, gpu) for size, dtype in sizes] == [4, 8, 96]
    assert convolution.padded_channels(3, torch.float32, torch.device("cpu")) == 3
    monkeypatch.setattr(convolution, "padded_channels", lambda channels, dtype, device: 4)
    weight, bias = convolution._aligned(torch.ones(3, 2, 1, 1, 1), torch.ones(3), 4)
    assert weight.shape == (4, 4, 1, 1, 1) and weight.sum() == 6 and bias.tolist() == [1, 1, 1, 0]
