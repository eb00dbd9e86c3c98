"""This package defines all options, and turns the options of a request into an effective config of five parts."""

from wanfast.runtime.config.effective import NO_VIDEO, OPTIONS, EffectiveConfig, accepted, of_command
from wanfast.runtime.config.models import ModelsConfig, QuantizeConfig, default_artifacts_dir
from wanfast.runtime.config.option import Options
from wanfast.runtime.config.ranks import RanksConfig
from wanfast.runtime.config.skipping import SkippingConfig, magcache_settings
from wanfast.runtime.config.video import OutputConfig, VideoConfig, parse_size

__all__ = [
    "NO_VIDEO",
    "OPTIONS",
    "EffectiveConfig",
    "ModelsConfig",
    "Options",
    "OutputConfig",
    "QuantizeConfig",
    "RanksConfig",
    "SkippingConfig",
    "VideoConfig",
    "accepted",
    "default_artifacts_dir",
    "magcache_settings",
    "of_command",
    "parse_size",
]
