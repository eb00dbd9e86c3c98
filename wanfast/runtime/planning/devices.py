"""Decides the device and the number of GPUs of a run, and checks what the GPUs of this machine can compute.

This module does not import torch.
"""

from __future__ import annotations

from typing import Literal

from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.errors import ConfigError, NeedsGpuError
from wanfast.runtime.facts.choices import LOSSY_ATTENTION, Device
from wanfast.runtime.machine import gpus
from wanfast.runtime.machine.packages import require_attention, require_fp8
from wanfast.runtime.planning.plan import Plan

_FLOAT8_CAPABILITY, _HOPPER = (8, 9), (9, 0)


def default_device() -> Device:
    """Returns cuda if the driver shows a GPU, else cpu.

    This function does not import torch. If torch finds no GPU later, a rank raises an error.
    """
    return "cuda" if gpus.visible_gpus() else "cpu"


def num_gpus_of(asked_for: int | Literal["auto"], device: Device, *, asked: bool) -> int:
    """Returns --num-gpus as a number; "auto" is the number of visible GPUs.

    `asked`: whether the user gave --device; this changes only the text of an error. Raises ConfigError in three cases:
    * "auto" on a CPU;
    * "auto" if no GPU is visible;
    * on GPUs, a number larger than the number of visible GPUs. (If no GPU is visible, each number is accepted.)
    """
    if device == "cpu":
        if asked_for == "auto":
            raise ConfigError(
                "--num-gpus auto counts GPUs, but this run is on the CPU: give a number of processes"
                f"{why_cpu(asked=asked)}"
            )
        return asked_for
    found = len(gpus.visible_gpus())
    if asked_for == "auto":
        if not found:
            raise ConfigError("--num-gpus auto: no GPU is visible here: give the number of GPUs to plan for")
        return found
    if 0 < found < asked_for:
        raise ConfigError(f"--num-gpus {asked_for}: the number of GPUs here is {found}: use --num-gpus {found} or auto")
    return asked_for


def why_cpu(*, asked: bool) -> str:
    """Returns the end of an error message: in parentheses, the reason why a request is planned for the CPU.

    `asked`: whether the user gave --device. If so, returns "", because the user knows the reason.
    """
    return "" if asked else " (no GPU was found, so the plan is for the CPU; --device cuda plans for GPUs)"


def require_capable(models: ModelsConfig, device: Device) -> None:
    """Raises ConfigError if `device` cannot compute what the options of `models` ask for."""
    if models.quantize == "fp8-rowwise" and device == "cuda" and (old := _without_float8()):
        raise ConfigError(f"--quantize fp8-rowwise: {old} cannot multiply in float8: use --quantize int8-dynamic")
    if models.attention in LOSSY_ATTENTION and device == "cuda" and (other := _not_hopper()):
        raise ConfigError(f"--attention {models.attention} needs Hopper GPUs, not {other}: use --attention auto")
    if models.tf32 and device == "cpu":
        raise NeedsGpuError("--tf32 needs a GPU: drop --tf32, or use --device cuda")


def require_attention_of(plan: Plan) -> None:
    """Raises ConfigError if the plan's device cannot run the plan's attention, for example if a package is missing."""
    models, device = plan.config.models, plan.config.ranks.device
    require_attention(models.attention, device)
    if plan.sparsity and plan.sparsity.has_fp8:
        require_fp8(device, f"--attention-plan {models.attention_plan}")


def _without_float8() -> str | None:
    """Returns the name of a GPU that is too old for float8, if there is one."""
    return next((gpu.name for gpu in gpus.visible_gpus() if gpu.capability < _FLOAT8_CAPABILITY), None)


def _not_hopper() -> str | None:
    """Returns the name of a GPU that is not of the Hopper generation, if there is one."""
    return next((gpu.name for gpu in gpus.visible_gpus() if gpu.capability != _HOPPER), None)
