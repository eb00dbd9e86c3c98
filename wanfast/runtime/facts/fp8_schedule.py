"""This module says in which steps and layers the self-attention of a video is computed in float8.

This module does not import torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from wanfast.runtime.errors import ConfigError

_SPAN = re.compile(r"(\d{1,6}):(\d{1,6})")
_EXACT_SHARE = 0.125  # of the steps, at the start and again at the end, by default


def parse_span(text: str) -> range | None:
    """Reads "4:36" as the numbers 4 to 35; returns None for a text of another form, or for an empty span."""
    match = _SPAN.fullmatch(text.strip())
    return (range(int(match[1]), int(match[2])) or None) if match else None


def can_rotate(head_dim: int) -> bool:
    """Returns whether there is a Hadamard matrix for heads of `head_dim` channels: for each power of two."""
    return head_dim & (head_dim - 1) == 0


@dataclass(frozen=True, kw_only=True)
class Fp8Schedule:
    """This class says which calls of self-attention of one video are computed in float8."""

    steps: range
    layers: range
    hadamard: bool  # whether queries and keys are multiplied by a Hadamard matrix before they are rounded

    @classmethod
    def of(
        cls,
        *,
        num_steps: int,
        num_layers: int,
        head_dim: int,
        steps: str | None = None,
        layers: str | None = None,
        hadamard: bool | None = None,
        may_be_empty: bool = False,
    ) -> Fp8Schedule:
        """Returns the schedule that the options describe.

        `steps`: the steps in float8, as a text: "4:36" means steps 4 to 35. By default, these are all steps except the
        first eighth and the last eighth; each eighth is rounded up to whole steps.
        `layers`: the layers in float8, as a text of the same form. By default, these are all layers.
        `hadamard`: whether queries and keys are multiplied by a Hadamard matrix before they are rounded to float8. By
        default, they are multiplied if `head_dim` is a power of two.
        `may_be_empty`: whether all steps may be exact if `steps` is None and the video is too short for float8.
        Raises ConfigError in three cases: `steps` or `layers` names a step or a layer that the video does not have;
        `steps` is None, no step is left for float8, and `may_be_empty` is False; `hadamard` is True, and `head_dim` is
        not a power of two.
        """
        guard = math.ceil(_EXACT_SHARE * num_steps)
        inner = range(guard, num_steps - guard) or range(0)
        if steps is None and not inner and not may_be_empty:
            raise ConfigError(
                f"--attention fa3-fp8: of {num_steps} steps, the first {guard} and the last {guard} would be exact, so "
                f"that no step is left for float8: add --fp8-steps 0:{num_steps}, for example"
            )
        if hadamard and not can_rotate(head_dim):
            raise ConfigError(
                f"--fp8-hadamard: this model's heads have {head_dim} channels, but this program has Hadamard matrices "
                "only for powers of two: drop --fp8-hadamard"
            )
        return cls(
            steps=inner if steps is None else _inside("--fp8-steps", steps, num_steps),
            layers=range(num_layers) if layers is None else _inside("--fp8-layers", layers, num_layers),
            hadamard=can_rotate(head_dim) if hadamard is None else hadamard,
        )

    def is_fp8(self, step: int, layer: int) -> bool:
        """Returns whether self-attention is computed in float8 in this step and layer; both count from 0."""
        return step in self.steps and layer in self.layers

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [self.steps.start, self.steps.stop],
            "layers": [self.layers.start, self.layers.stop],
            "hadamard": self.hadamard,
        }


def _inside(option: str, text: str, count: int) -> range:
    span = parse_span(text)
    assert span is not None, "the option was checked"
    if span.stop > count:
        raise ConfigError(
            f"{option} {text}: there are only {count} {option.removeprefix('--fp8-')}, counted from 0: use a second "
            f"number of {count} or less"
        )
    return span
