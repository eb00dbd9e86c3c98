"""States the published seconds of a whole video for some recipes: 8 H100 GPUs, 1280x720, 81 frames, 40 steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wanfast.runtime.facts.choices import RecipeName

PUBLISHED_S: Mapping[RecipeName, float] = MappingProxyType(
    {
        "baseline": 250.7,
        "fa3": 195.1,
        "fa3-tf32": 159.6,
        "int8": 170.2,
        "magcache": 157.1,
        "magcache-tf32": 150.5,
        "compile": 142.9,
        "compile-int8": 142.4,
        "compile-tf32": 142.7,
        "fastest-original": 109.8,
        "fastest-original-e024k2r10": 98.9,
    }
)
