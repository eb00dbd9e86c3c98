"""Classifier-free guidance pushes the prediction away from the negative prompt's.

Source: Ho & Salimans (arXiv 2207.12598) eq. 6, with the weight written as a scale: 1 means only the prompt.
"""

from __future__ import annotations

from typing import Any


def guide(conditional: Any, unconditional: Any, scale: float) -> Any:
    """Returns unconditional + scale (conditional - unconditional), elementwise."""
    return unconditional + scale * (conditional - unconditional)


def needs_unconditional(scale: float) -> bool:
    """Returns whether the unconditional branch must run; at scale 1 it cancels out, which saves half of the work."""
    return scale != 1.0
