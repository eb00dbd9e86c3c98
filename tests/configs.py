"""An effective config for tests that plan nothing: every question answered, one rank."""

from __future__ import annotations

from typing import Any

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.facts.model_spec import A14B

_DECIDED = {"cfg_parallel": 1, "ulysses": 1, "dit_fsdp": "off", "t5_fsdp": "off", "expert_offload": "off"}


def effective_config(**options: Any) -> EffectiveConfig:
    """The tiny model on a CPU, and the options that are given."""
    own = {"model": "tiny", "image": "none", "prompt": "none", "device": "cpu", "size": "64x64", "frames": 5}
    return EffectiveConfig.of({**own, **_DECIDED, **options}, A14B)
