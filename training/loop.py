"""Optimises a network for every stage: seeded steps, EMA, a log of losses, checkpoints that resume bit for bit.

Muon moves matrices and convolutions, and AdamW all other parameters. A step's data and noise depend only on its number,
so that an interrupted and resumed run equals one long run. Learning rates warm up, stay constant, and decay linearly
over the last share `decay` of the steps.
Kernel launches, not the GPU, limit the speed of networks this small. So forward and backward are captured as a CUDA
graph, one for each shape of batches, and replayed. The first batches of each shape are also computed without a graph,
and the gradients compared. Nothing is compiled (LOG.md): compiled blocks have given wrong gradients in some batches,
without an error, and the order in which a compiled norm saw its shapes changed the last bits.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from training.muon import Muon

_NO_MATRICES = ("norm", "modulation", "token_embedding", "pos_embedding", "head.head", "noise.up.")  # or zero at first
_MAX_NORM = 1000.0  # before clipping; a healthy stage has 0.2 to 30
_COMPARED = 12  # batches of each shape; faults depend on the data, and one batch may miss them
_MAX_DIFFERENCE = 0.25  # relative, of the gradients with and without a graph; bf16 alone gives a few percent
Batch = tuple[Tensor, ...]
DrawFn = Callable[[int, torch.Generator], Batch]  # (step, generator) -> batch
LossFn = Callable[..., dict[str, Tensor]]  # batch -> named terms; "loss" is minimised


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sets the total number of steps and the learning rates of a stage.

    A process makes steps until all are made, or until `deadline` in seconds of the monotonic clock.
    """

    steps: int
    muon_rate: float
    adam_rate: float = 1e-3
    weight_decay: float = 0.0  # of Muon's matrices
    deadline: float = math.inf
    save_every: float = 2.0  # minutes
    warmup: int = 200
    decay: float = 0.5
    ema: float = 0.999
    seed: int = 0
    log_every: int = 49  # no common factor with the number of a stage's kinds of batches, so that each is logged

    def share(self, step: int) -> float:
        """Returns the factor, at most 1, by which both learning rates are multiplied at a step."""
        decay = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return min(1.0, (step + 1) / self.warmup) * max(decay, 0.01)


def prepare_torch() -> None:
    """Makes torch deterministic, so that a resumed run equals an uninterrupted one, also on a GPU.

    Call it before the first matrix product, because the libraries read their settings once. Later, kernels without a
    deterministic form raise RuntimeError. TF32 is as deterministic as float32.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it only guards against bugs, and many fills cost time


def train(name: str, network: nn.Module, draw: DrawFn, loss: LossFn, schedule: Schedule, folder: Path) -> bool:
    """Trains `network`, resuming from folder/name.pt if it exists; returns whether all steps are made.

    The checkpoint stores the averaged parameters under "ema". Parameters that require no gradient do not change.
    `draw(step, generator)` returns a batch; the generator is seeded for the step. `loss(*batch)` must not draw random
    numbers. Raises RuntimeError if the gradients' norm is not finite or far too large, or if a graph's gradients are
    wrong: then a kernel computes wrong values.
    """
    device = next(network.parameters()).device
    parameters = list(network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    muon, adam = optimizers = _optimizers(network, schedule)
    average = [parameter.detach().clone() for parameter in parameters]
    file, step = folder / f"{name}.pt", 0
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        average, step = state["ema"], state["step"]
        if step >= schedule.steps:
            return True
    log_file = folder / f"{name}.jsonl"
    _forget_lines_after(log_file, step)

    def save_all() -> None:
        state = {"network": network.state_dict(), "ema": average, "step": step}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save(state, file)

    generator = torch.Generator(device).manual_seed(schedule.seed)
    gradients = _gradients(trained, loss)
    step_muon = _stepping(muon, device)
    saved = logged = monotonic()
    logged_step = step - 1
    with log_file.open("a") as log:
        while step < schedule.steps and monotonic() < schedule.deadline:
            muon.rate.fill_(schedule.muon_rate * schedule.share(step))
            adam.param_groups[0]["lr"] = schedule.adam_rate * schedule.share(step)
            generator.manual_seed(schedule.seed * 1_000_003 + step)
            batch = draw(step, generator)
            terms = gradients(batch)
            step_muon()
            adam.step()
            # early on, the average forgets its random start faster
            torch._foreach_lerp_(
                average, [p.detach() for p in parameters], 1 - min(schedule.ema, (1 + step) / (10 + step))
            )
            if step % schedule.log_every == 0:
                values = {key: round(float(value.detach()), 5) for key, value in terms.items()}
                if not values["norm"] < _MAX_NORM:
                    raise RuntimeError(
                        f"{name}: the gradients' norm is {values['norm']} at step {step}: some kernel is wrong"
                    )
                now = monotonic()
                pace = (now - logged) / (step - logged_step)
                logged, logged_step = now, step
                line = json.dumps({"step": step, "batch": list(batch[0].shape), **values, "s_per_step": round(pace, 4)})
                print(name, line, flush=True)
                log.write(line + "\n")
            step += 1
            if monotonic() - saved > schedule.save_every * 60:
                saved = monotonic()
                save_all()
    save_all()
    print(f"{name}: {step} of {schedule.steps} steps", flush=True)
    return step >= schedule.steps


def save(state: object, file: Path) -> None:
    """Writes `file` with torch.save; a killed process leaves the file as it was, and two processes may write it."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(file)


def _optimizers(network: nn.Module, schedule: Schedule) -> tuple[Muon, torch.optim.AdamW]:
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() >= 2 and not any(part in name for part in _NO_MATRICES)
        (matrices if is_matrix else others).append(parameter)
    rate, on_gpu = schedule.adam_rate, others[0].device.type == "cuda"
    return Muon(matrices, schedule.weight_decay), torch.optim.AdamW(
        others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu
    )


def _gradients(parameters: list[nn.Parameter], loss: LossFn) -> Callable[[Batch], dict[str, Tensor]]:
    """Returns a function that sets the parameters' clipped gradients for a batch and returns the loss's terms."""
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # of all graphs, also of the optimizer's

    def eager(batch: Batch) -> dict[str, Tensor]:
        torch._foreach_zero_(gradients)
        terms = loss(*batch)
        terms["loss"].backward()
        return terms | {"norm": nn.utils.clip_grad_norm_(parameters, 1.0)}

    if parameters[0].device.type != "cuda":
        return eager
    graphs: dict[tuple[torch.Size, ...], _Graph] = {}
    compared: Counter[tuple[torch.Size, ...]] = Counter()

    def replay(batch: Batch) -> dict[str, Tensor]:
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in graphs:
            pool = next(iter(graphs.values())).graph.pool() if graphs else None
            graphs[shapes] = _capture(eager, batch, pool)
        terms = graphs[shapes].replay(batch)
        if compared[shapes] < _COMPARED:
            compared[shapes] += 1
            require_as_eager(gradients, lambda: eager(batch))
        return terms

    return replay


def require_as_eager(gradients: list[Tensor], compute: Callable[[], object]) -> None:
    """Compares `gradients` with those that `compute` writes into the same tensors without a graph.

    Afterwards the tensors hold the given gradients again. Raises RuntimeError if the relative difference of all
    gradients together is above 25 %.
    """
    found = [gradient.clone() for gradient in gradients]
    compute()
    difference = _relative_difference(found, gradients)
    torch._foreach_copy_(gradients, found)
    if not difference <= _MAX_DIFFERENCE:
        raise RuntimeError(
            f"the gradients differ by {difference:.0%} from those without a CUDA graph: a kernel is wrong"
        )


def _relative_difference(found: list[Tensor], gradients: list[Tensor]) -> float:
    """Returns the norm of all differences together, divided by the norm of all `gradients`."""
    difference, norm = (
        torch.stack(torch._foreach_norm(each)).norm() for each in (torch._foreach_sub(found, gradients), gradients)
    )
    return float(difference / norm)


@dataclass(frozen=True)
class _Graph:
    """Holds a captured graph and its memory: the batch that it reads, and the terms that it writes."""

    graph: torch.cuda.CUDAGraph
    held: Batch
    terms: dict[str, Tensor]

    def replay(self, batch: Batch) -> dict[str, Tensor]:
        torch._foreach_copy_(self.held, batch)
        self.graph.replay()
        return self.terms


def _capture(eager: Callable[[Batch], dict[str, Tensor]], example: Batch, pool: tuple[int, int] | None) -> _Graph:
    """Captures a step on a batch shaped like `example`; graphs share a memory pool, because one runs at a time."""
    held = tuple(tensor.clone() for tensor in example)
    _aside(lambda: eager(held), times=3)  # libraries initialise before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        terms = eager(held)
    return _Graph(graph, held, terms)


def _stepping(muon: Muon, device: torch.device) -> Callable[[], None]:
    """Returns a function that makes a step of Muon: on a GPU a captured graph, because it has some hundred kernels."""
    if device.type != "cuda":
        return muon.step
    _aside(muon.rehearse, times=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        muon.step()
    return graph.replay


def _aside(work: Callable[[], object], times: int) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            work()
    torch.cuda.synchronize()


def _forget_lines_after(log_file: Path, step: int) -> None:
    """Removes the log lines from `step` on, which a killed run logged but did not save."""
    if log_file.exists():
        kept = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] < step]
        log_file.write_text("".join(line + "\n" for line in kept))


def steps_made(file: Path) -> int:
    """Returns the number of steps in a checkpoint; 0 if it is missing."""
    return int(torch.load(file, map_location="cpu", weights_only=True)["step"]) if file.exists() else 0


def load_ema(network: nn.Module, file: Path) -> None:
    """Loads the averaged parameters of a checkpoint into `network`."""
    state = torch.load(file, map_location=next(network.parameters()).device, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), state["ema"], strict=True):
            parameter.copy_(value)


def initialise(network: nn.Module, seed: int, zero: tuple[str, ...] = ()) -> None:
    """Initialises every parameter.

    Matrices are normal with standard deviation fan_in ** -0.5, and norms are one. All others are zero, as are the
    parameters whose name contains an entry of `zero`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if any(part in name for part in zero) or leaf == "bias":
            value = torch.zeros(parameter.shape)
        elif "norm" in name:
            value = torch.ones(parameter.shape)
        elif parameter.dim() >= 2 and "modulation" not in name:
            value = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        else:
            value = torch.zeros(parameter.shape)
        parameter.data = value.to(parameter.dtype)
