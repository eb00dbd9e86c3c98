"""This module runs an attention kernel on two small problems, and compares its results with exact results in float64.

A package that can be imported may still lack kernels for this GPU, or need another layout or CUDA version. So the state
"runs" means that the kernel's results were correct. Shapes: B batch, L tokens, H heads, D head dim.

The first problem has whole blocks of tokens, contiguous tensors, and as many queries as keys. In the second problem,
the last block is not full, v is a slice of a wider tensor, and there are more keys than queries. Calls of
both kinds occur in a video.
Cost: each kernel is called twice. FlashAttention-4 also compiles for about ten seconds, but only once.
Limit: if a kernel breaks the process's CUDA context, all later kernels fail too.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import LOSSY_ATTENTION, Attention, Precision
from wanfast.runtime.facts.sparsity import BLOCK
from wanfast.runtime.machine.packages import ATTENTION_ON_CPU, ATTENTION_PACKAGES, install, require_attention
from wanfast.runtime.models.attention_fp8 import Fp8Heads, fp8_attention, scale_of
from wanfast.runtime.models.attention_kernels import KERNELS, AttentionFn, Kernel
from wanfast.runtime.models.block_sparse import BlockLists, block_sparse_attention
from wanfast.runtime.models.fused import heads_to_fp8
from wanfast.runtime.weights.builders import DTYPES

HEAD_DIM = 128  # the A14B's
_LENGTHS = ((256, 256), (200, 333))  # queries and keys of each problem; both numbers of queries give two blocks
BOUNDS = {torch.bfloat16: 0.01, torch.float32: 1e-5}  # relative errors; only rounding to bf16 gives 0.002 to 0.004
# A kernel raises these on a machine, or beside package versions, that it does not support.
_FAILURES = (RuntimeError, ImportError, OSError, AssertionError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class Finding:
    """Holds the result of a probe.

    If the kernel gives correct results, `state` is "runs", and `relative_error` is the largest error that was measured.
    Otherwise `reason` says why the kernel does not run.
    """

    state: Literal["runs", "not installed", "needs a GPU", "fails"]
    relative_error: float | None = None  # None if the kernel does not run
    reason: str | None = None  # None if the kernel runs


class _Probed(NamedTuple):
    """Says how a kernel is probed: the call, the exact result, and the bound of the error."""

    run: AttentionFn
    formula: AttentionFn
    bound: float


@dataclass(frozen=True)
class Choice:
    """Holds the name of the attention kernel that the experts use, and why it was chosen."""

    kernel: Attention
    why: str
    dense: Attention | None = None  # the kernel of the exact calls beside lossy ones

    @property
    def exact(self) -> Attention:
        """Returns the kernel for calls that must be exact: `dense` if `kernel` is lossy, otherwise `kernel`."""
        return self.dense or self.kernel


def choose(asked: Attention, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
    """Probes the requested kernel and returns it; for `auto`, returns the fastest kernel that gives correct results.

    If the requested kernel is lossy, the function also chooses a kernel for the calls that stay exact, in the same way
    as for `auto`. Raises ConfigError if the requested kernel is not installed, raises an error or gives wrong results.
    For `auto`, raises ConfigError if no installed kernel gives correct results.
    """
    if asked != "auto":
        if asked in LOSSY_ATTENTION:
            require_attention(asked, device)
        found = probe(asked, device, dtype, head_dim)
        if found.state != "runs":
            raise ConfigError(
                f"--attention {asked}: {found.state} ({found.reason}): make this kernel work, or use --attention auto"
            )
        why = f"as asked, relative error {found.relative_error:.1e}"
        if asked not in LOSSY_ATTENTION:
            return Choice(asked, why)
        dense = choose("auto", device, dtype, head_dim)
        return Choice(asked, f"{why}; exact calls by {dense.kernel}, {dense.why}", dense.kernel)
    rejected: list[str] = []
    for name in _candidates(device):
        found = probe(name, device, dtype, head_dim)
        if found.state == "runs":
            first = f"the first of {', '.join(KERNELS)} that runs here, relative error {found.relative_error:.1e}"
            return Choice(cast("Attention", name), "; ".join([first, *rejected]))
        rejected.append(f"{name} {found.state}")
    raise ConfigError(
        f"--attention auto: none of {', '.join(_candidates(device))} works on {device}: run `wanfast doctor` to see why"
    )


def agree(asked: Attention, ranks: Ranks, dtype: torch.dtype, head_dim: int) -> Choice:
    """Lets the leader choose a kernel, lets every other rank probe that kernel, and returns the leader's choice.

    All ranks must call this function, and all get the same choice. Every rank probes, because a kernel may be missing
    on another machine. Raises ConfigError on all ranks if, on at least one rank, the kernel is not installed or does
    not give correct results.
    """
    choice = ranks.lead(lambda: choose(asked, ranks.device, dtype, head_dim))

    def tried() -> None:
        for kernel in filter(None, () if ranks.is_leader else (choice.kernel, choice.dense)):
            found = probe(kernel, ranks.device, dtype, head_dim)
            if found.state != "runs":
                raise ConfigError(
                    f"--attention {asked}: the leader chose {kernel}, but another rank reports: {found.state} "
                    f"({found.reason}): make that kernel work on all ranks, or use --attention with another kernel"
                )

    ranks.together(tried)
    return choice


@functools.cache
def runs_fp8(device: str, precision: Precision, head_dim: int) -> bool:
    """Returns whether the kernel of float8 attention gives correct results on this rank."""
    return probe("fa3-fp8", device, DTYPES[precision], head_dim).state == "runs"


def require_fp8(ranks: Ranks, precision: Precision, head_dim: int, option: str = "--attention-plan") -> None:
    """Raises ConfigError on all ranks if a rank cannot compute attention heads in float8.

    `option` is the option that asks for float8; the error names it.
    """

    def tried() -> None:
        if not runs_fp8(ranks.device, precision, head_dim):
            raise ConfigError(
                f"{option}: heads in float8 need the kernel fa3-fp8, which does not run on all ranks: run "
                "`wanfast doctor` to see why, or use a plan without float8"
            )

    ranks.together(tried)


def probe_all(device: str) -> dict[str, Finding]:
    """Probes all kernels that may run on `device`, and returns {kernel: finding}.

    On a CPU, the kernels of optional packages are probed too. These kernels cannot run there, but the findings say
    whether the packages are installed. Lossy kernels are probed on a GPU only; a CPU always computes their emulations.
    """
    names = [name for name, kernel in KERNELS.items() if kernel.modules or name in _candidates(device)]
    names += LOSSY_ATTENTION if device == "cuda" else ()
    return {name: probe(name, device) for name in names}


def _candidates(device: str) -> list[str]:
    return [name for name in KERNELS if device == "cuda" or name in ATTENTION_ON_CPU]


def probe(name: str, device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = HEAD_DIM) -> Finding:
    """Runs one kernel on small problems in `dtype`, and returns a `Finding`, which says whether the results are right.

    If the kernel is not installed, raises an error or gives a wrong result, the finding holds the reason.
    """
    lossy = _LOSSY[name] if name in LOSSY_ATTENTION else None
    kernel = Kernel(lossy.run, *ATTENTION_PACKAGES.get(name, ())) if lossy else KERNELS[name]
    is_emulated = lossy and device == "cpu"
    probed = lossy or _Probed(kernel.run, _formula, BOUNDS[dtype])
    try:
        if not kernel.is_installed and not is_emulated:
            return Finding("not installed", reason=install(kernel.extra))
        errors = [_relative_error(probed, *_problem(*lengths, dtype, head_dim, device)) for lengths in _LENGTHS]
    except _FAILURES as error:
        if isinstance(error, NotImplementedError) and device == "cpu":  # torch's message is as long as a page
            return Finding("needs a GPU", reason="the package has no code for a CPU")
        return Finding("fails", reason=(str(error).strip().splitlines() or [type(error).__name__])[0])
    return Finding("runs", relative_error=max(errors))


def _problem(queries: int, keys: int, dtype: torch.dtype, head_dim: int, device: str) -> list[Tensor]:
    """Returns q, k and v. If there are more keys than queries, v is a slice of a tensor of three times the width."""
    generator = torch.Generator().manual_seed(0)
    width = 2 * head_dim
    widths = (width, width, 3 * width if keys > queries else width)
    drawn = [
        torch.randn(1, length, d, generator=generator).to(device, dtype)
        for length, d in zip((queries, keys, keys), widths, strict=True)
    ]
    return [x[..., -width:].view(1, -1, 2, head_dim) for x in drawn]


def _relative_error(probed: _Probed, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Returns the relative error of a result; raises ValueError if it is over the bound, or has another shape."""
    expected = probed.formula(*(x.cpu().double() for x in (q, k, v)))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch explains each back end that it rejects
        got = probed.run(q, k, v).cpu()
    if got.shape != expected.shape:
        raise ValueError(f"the kernel's result has the shape {list(got.shape)}, not {list(expected.shape)}")
    error = float((got.double() - expected).norm() / expected.norm())
    if not error <= probed.bound:  # also for NaN
        lengths = f"{q.shape[1]} queries and {k.shape[1]} keys"
        wrong = f"relative error {error:.1g} is over the bound {probed.bound}"
        raise ValueError(f"the kernel's result is wrong: {wrong}, for {lengths}")
    return error


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def _sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes a small problem with lists: block 0 attends to the last block of keys, block 1 to the first and last."""
    last = (k.shape[1] - 1) // BLOCK
    counts, blocks = torch.tensor([1, 2]), torch.tensor([[last, 0], [0, last]])
    lists = BlockLists(*(x.int().expand(1, q.shape[2], *x.shape).contiguous().to(q.device) for x in (counts, blocks)))
    return block_sparse_attention(q, k, v, lists, BLOCK)


def _fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scales = torch.stack([scale_of(x.float().abs().amax((0, 1, 3))) for x in (q, k, v)])
    q8, k8, v8 = (heads_to_fp8(x.flatten(2), scale)[0] for x, scale in zip((q, k, v), scales, strict=True))
    return fp8_attention(Fp8Heads(q8, k8, v8, scales), q.dtype)


_LOSSY = {
    "sparse": _Probed(_sparse, _sparse, BOUNDS[torch.bfloat16]),
    "fa3-fp8": _Probed(_fp8, _formula, 0.15),
}
