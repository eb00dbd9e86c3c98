"""Which attention kernels work here: each is run once on a small problem and compared with the formula in float64.

That a package imports says little: it may lack this GPU's kernels, or expect another layout or CUDA. What "runs" gave
the right numbers. Shapes: B batch, L tokens, H heads, D head dim.

Cost: a forward each; FlashAttention-4 compiles first, some ten seconds. Limit: a kernel that breaks the process's CUDA
context takes those after it along.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Attention
from wanfast.runtime.machine.packages import ATTENTION_ON_CPU
from wanfast.runtime.models.attention_kernels import KERNELS

HEAD_DIM = 128  # the A14B's
BOUNDS = {torch.bfloat16: 0.01, torch.float32: 1e-5}  # rounding to bf16 alone is 0.002 to 0.004
# What a kernel says on a machine, or beside versions of other packages, that it was not made for.
_FAILURES = (RuntimeError, ImportError, OSError, AssertionError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class Finding:
    """What came of a kernel, and why it did not run."""

    state: Literal["runs", "not installed", "fails"]
    relative_error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that runs, and why it is that one."""

    kernel: Attention
    why: str


def choose(asked: Attention, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
    """The kernel that is asked for, or the fastest that is right here.

    Raises ConfigError with the fix if the one asked for is not there, or not right.
    """
    if asked != "auto":
        found = probe(asked, device, dtype, head_dim)
        if found.state != "runs":
            raise ConfigError(f"--attention {asked}: {found.state} ({found.reason}): fix that, or take auto")
        return Choice(asked, f"as asked, relative error {found.relative_error:.1e}")
    passed_over: list[str] = []
    for name in _candidates(device):
        found = probe(name, device, dtype, head_dim)
        if found.state == "runs":
            first = f"the first of {', '.join(KERNELS)} that runs here, relative error {found.relative_error:.1e}"
            return Choice(cast("Attention", name), "; ".join([first, *passed_over]))
        passed_over.append(f"{name} {found.state}")
    raise ConfigError(
        f"--attention auto: none of {', '.join(_candidates(device))} works on {device}: see `wanfast doctor`"
    )


def agree(asked: Attention, ranks: Ranks, dtype: torch.dtype, head_dim: int) -> Choice:
    """The leader's choice, which every rank has tried: another machine may lack it. Raises ConfigError on all."""
    choice = ranks.lead(lambda: choose(asked, ranks.device, dtype, head_dim))

    def tried() -> None:
        found = Finding("runs") if ranks.is_leader else probe(choice.kernel, ranks.device, dtype, head_dim)
        if found.state != "runs":
            raise ConfigError(
                f"--attention {asked}: the first rank took {choice.kernel}, {found.state} on another ({found.reason}): "
                "fix that, or name a kernel that all have"
            )

    ranks.together(tried)
    return choice


def probe_all(device: str) -> dict[str, Finding]:
    """Every kernel that could run on `device`; a package for GPUs that is installed is tried on a CPU too."""
    names = [name for name, kernel in KERNELS.items() if kernel.modules or name in _candidates(device)]
    return {name: probe(name, device) for name in names}


def _candidates(device: str) -> list[str]:
    return [name for name in KERNELS if device == "cuda" or name in ATTENTION_ON_CPU]


def probe(name: str, device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = HEAD_DIM) -> Finding:
    """Run one kernel. Packages that are not there are not imported."""
    kernel = KERNELS[name]
    q, k, v = _problem(dtype, head_dim)
    expected = _formula(q.double(), k.double(), v.double())
    try:
        if not kernel.is_installed:
            return Finding("not installed", reason=f"pip install {kernel.package}")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains each back end that it does not take
            got = kernel.run(q.to(device), k.to(device), v.to(device)).cpu()
    except _FAILURES as error:
        return Finding("fails", reason=(str(error).strip().splitlines() or [type(error).__name__])[0])
    if got.shape != expected.shape:
        return Finding("fails", reason=f"its result is {list(got.shape)}, not {list(expected.shape)}")
    relative_error = float((got.double() - expected).norm() / expected.norm())
    if not relative_error <= BOUNDS[dtype]:  # NaN too
        return Finding(
            "fails", reason=f"its result is wrong: relative error {relative_error:.1g}, over {BOUNDS[dtype]}"
        )
    return Finding("runs", relative_error=relative_error)


def _problem(dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 256, 2, head_dim, generator=generator).to(dtype) for _ in "qkv"]


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
