"""These operators let a compiled block call lossy attention, which is sparse attention or attention in float8.

Steps and layers of a video differ in their attention. A graph that contained the attention of one step would be
compiled again for the next step. So a graph contains only an operator, and the operator calls the object that the
function `run` has set.

Shapes: B batch (1), L tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from wanfast.runtime.models.operators import opaque


class Running(Protocol):
    """This interface computes lossy self-attention and measures its error; this module's operators call it.

    The arguments do not say which layer of which step is computed. The implementation must know this itself.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the attention [B, L, H, D] of the queries q to the keys k; v are the values."""
        ...

    def check(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Returns the relative error [H] of each head, compared with exact attention.

        All arguments are [B, L, H, D] and belong to this rank's tokens. `out` is the attention whose error is measured.
        """
        ...


_running: Running | None = None  # a process makes one video at a time


def run(lossy: Running | None) -> None:
    """Makes the operators of this module call `lossy` from now on.

    After a video, call `run(None)`, so that this module no longer refers to the models, and the models can be freed.
    """
    global _running
    _running = lossy


@opaque("wanfast::lossy_attention", shape=lambda q, k, v: q.new_empty(q.shape))
def lossy_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention [B, L, H, D] of the queries q to the keys k, with values v.

    The object that `run` received last computes the attention.
    """
    assert _running is not None, "no video was started"
    return _running.attend(q, k, v).contiguous()


@opaque("wanfast::check_attention", shape=lambda q, k, v, out, errors: None, mutates=("errors",))
def check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, errors: Tensor) -> None:
    """Writes each head's relative error, compared with exact attention, into `errors` [H].

    `out` is the attention whose error is measured. `out`, q, k and v are [B, L, H, D].
    """
    # The errors are written into an argument, because a compiled graph would drop an operator whose result nobody uses.
    assert _running is not None, "no video was started"
    errors.copy_(_running.check(q, k, v, out))
