"""The JSON beside every video: what was asked, what ran, with which versions, how long; enough to run it again."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

from wanfast.runtime.packages import version_of
from wanfast.runtime.plan import Plan

_PACKAGES = ("wanfast", "torch", "numpy", "safetensors", "tokenizers", "ftfy", "pillow", "av")
_OPTIONAL = ("triton", "torchao", "fa3-fwd", "flash-attn-4", "flash-attn", "diffusers")  # said where they are


def versions() -> dict[str, str]:
    """Versions of everything that can change a pixel, without importing any of it."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: version_of(package) or "not installed as a package" for package in _PACKAGES}
    return found | {package: there for package in _OPTIONAL if (there := version_of(package))}


def planned(plan: Plan, requested: dict[str, Any]) -> dict[str, Any]:
    """The result document before any work: a dry run's; a run adds its seconds, memory, hardware and weights."""
    return {
        "output": plan.config.output,
        "plan": plan.to_json(),
        "requested": requested,
        "effective": dataclasses.asdict(plan.config),
        "seconds": {},
        "versions": versions(),
    }
