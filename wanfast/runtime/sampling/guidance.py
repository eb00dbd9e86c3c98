"""Classifier-free guidance: push the prediction away from the negative prompt's.

Source: Ho & Salimans (arXiv 2207.12598) eq. 6, with the weight written as a scale: 1 means the prompt alone.
"""

from __future__ import annotations

from typing import Any


def guide(conditional: Any, unconditional: Any, scale: float) -> Any:
    """unconditional + scale (conditional - unconditional), elementwise."""
    return unconditional + scale * (conditional - unconditional)


def needs_unconditional(scale: float) -> bool:
    """At scale 1 the unconditional branch cancels out, and half of the work with it."""
    return scale != 1.0
