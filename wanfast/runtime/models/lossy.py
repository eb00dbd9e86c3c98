"""These operators let a compiled block call lossy attention, which is sparse attention or attention in float8.

Steps and layers of a video differ in their attention. A graph that contained the attention of one step would be
compiled again for the next step. So a graph contains only an operator, and the operator calls the function that `run`
has set.

Shapes: B batch (1), L tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.operators import opaque

CheckFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (q, k, v, out, constant) -> errors

_attend: AttentionFn | None = None  # a process makes one video at a time
_check: CheckFn | None = None


def run(*, attend: AttentionFn | None = None, check: CheckFn | None = None) -> None:
    """Makes the operators of this module call `attend` and `check` from now on; see the operators for their arguments.

    The arguments do not say which layer of which step is computed. The two functions must know this themselves.
    After a video, call `run()`, so that this module no longer refers to the models, and the models can be freed.
    """
    global _attend, _check
    _attend, _check = attend, check


@opaque("wanfast::lossy_attention", shape=lambda q, k, v: q.new_empty(q.shape))
def lossy_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention [B, L, H, D] of the queries q to the keys k, with values v, as `attend` computes it."""
    assert _attend is not None, "no video was started"
    return _attend(q, k, v).contiguous()


@opaque("wanfast::check_attention", shape=lambda q, k, v, out, constant, errors: None, mutates=("errors",))
def check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, constant: Tensor, errors: Tensor) -> None:
    """Writes each head's relative error, compared with exact attention, into `errors` [H], as `check` computes it.

    The error of `out` + `constant` is measured. `out`, q, k and v are [B, L, H, D] of this rank's tokens; `constant` is
    [H, D], the same for all tokens.
    """
    # The errors are written into an argument, because a compiled graph would drop an operator whose result nobody uses.
    assert _check is not None, "no video was started"
    errors.copy_(_check(q, k, v, out, constant))
