"""Classifier-free guidance moves the prediction for the prompt away from the prediction for the negative prompt.

Source: Ho & Salimans (arXiv 2207.12598) eq. 6 with scale = 1 + w; at scale 1 the negative prompt has no effect.
"""

from __future__ import annotations

from typing import Any


def guide(conditional: Any, unconditional: Any, scale: float) -> Any:
    """Returns unconditional + scale (conditional - unconditional), elementwise."""
    return unconditional + scale * (conditional - unconditional)


def needs_unconditional(scale: float) -> bool:
    """Returns whether the negative prompt's branch must run: False at scale 1, which saves half of the work."""
    return scale != 1.0
