"""Defines the options of MagCache, which skips forwards, and the short names of MagCache's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from wanfast.runtime.config.option import LOSSY, OF_MEASUREMENT, Option, Part, at_least, between, options_of
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import MagCacheRule
from wanfast.runtime.facts.model_spec import A14B, PUBLISHED

_MAGCACHE_NAME = re.compile(r"E(\d)(\d{2,})K(\d+)R(\d{2})")
_SHORT = ("magcache_thresh", "magcache_k", "retention_ratio")  # the settings in a short name, in order
_AMOUNT = "how much is skipped"
_CURVE_KEY = re.compile(r"[0-9a-f]{12}")
_BOTH: MagCacheRule = "both-experts"
_WITH_BOTH = ", ".join(name for name, spec in PUBLISHED.items() if spec.magcache_rule == _BOTH)


def magcache_settings(name: str) -> tuple[float, int, float] | None:
    """Returns (threshold, skips in a row, retention ratio) for a short name: (0.12, 2, 0.2) for E012K2R20.

    Returns None for any other name.
    """
    match = _MAGCACHE_NAME.fullmatch(name)
    if match is None:
        return None
    whole, rest, skips, retention = match.groups()
    return float(f"{whole}.{rest}"), int(skips), int(retention) / 100


def default_rule(options: Mapping[str, Any], own: MagCacheRule) -> MagCacheRule:
    """Returns the default of --magcache-rule, which says which experts may skip forwards.

    The default is "both-experts" if the effective `options` have --magcache-budget, --magcache-skip or --sigmas.
    Otherwise it is `own`, the model's own default.
    """
    is_both = any(options[name] is not None for name in ("magcache_budget", "magcache_skip", "sigmas"))
    return _BOTH if is_both else own


def spelled_out(name: str) -> dict[str, Any]:
    """Returns {option: value} for a short name of MagCache settings, such as E012K2R20; for other names, returns {}."""
    settings = magcache_settings(name)
    return {"magcache": "preset", **dict(zip(_SHORT, settings, strict=True))} if settings else {}


@dataclass(frozen=True, kw_only=True)
class SkippingConfig(Part):
    """This part of a config says which forwards MagCache skips. Source: MagCache (arXiv 2506.09045)."""

    magcache: Annotated[
        str,
        Option(
            "Skip forwards whose residual hardly changes. A measured curve predicts the change. preset uses the curve "
            "that ships for the model. artifact uses the curve that was calibrated for these options. KEY uses the "
            "stored curve with this key. E012K2R20 means preset, with threshold 0.12, at most 2 skips in a row, and "
            "the first 20 % never skipped.",
            LOSSY,
            also=("serve",),
            metavar="<off|preset|artifact|KEY|E012K2R20>",
            follows=OF_MEASUREMENT,
        ),
    ] = "off"
    magcache_thresh: Annotated[
        float | None,
        Option(
            "Limit of the accumulated error of skips in a row. A forward whose skip would reach the limit is computed.",
            LOSSY,
            also=("serve",),
            choice=_AMOUNT,
            default="0.12",
            follows=("magcache",),
            check=lambda x: None if 0 < x <= 10 else "use 0.01 to 10",
        ),
    ] = None
    magcache_k: Annotated[
        int | None,
        Option(
            "Largest number of skips in a row in one branch of guidance.",
            LOSSY,
            also=("serve",),
            default="2",
            follows=("magcache",),
            check=between(1, 1000, "use 1 to 1000 skips in a row"),
        ),
    ] = None
    retention_ratio: Annotated[
        float | None,
        Option(
            "Share of each expert's forwards, counted from the first, that are never skipped.",
            LOSSY,
            also=("serve",),
            default="0.2",
            follows=("magcache",),
            check=between(0, 1, "use a share, 0 to 1"),
        ),
    ] = None
    magcache_rule: Annotated[
        MagCacheRule | None,
        Option(
            "Experts whose forwards may be skipped. The high-noise expert decides motion and layout.",
            LOSSY,
            also=("serve",),
            default=f"{A14B.magcache_rule}; {_BOTH} for {_WITH_BOTH}, or with --magcache-budget, --magcache-skip, "
            "--sigmas",
            follows=("model", "magcache", "sigmas", "steps", "shift"),
        ),
    ] = None
    magcache_joint: Annotated[
        Literal["on", "off"],
        Option(
            "Both branches of guidance skip the same steps, so that every mesh skips the same forwards. With off, "
            "each branch has its own skips, as in MagCache's publication.",
            LOSSY,
            also=("serve",),
        ),
    ] = "on"
    magcache_budget: Annotated[
        float | None,
        Option(
            "Share of forwards to compute. Skipped forwards are chosen so that the sum of their errors is smallest.",
            LOSSY,
            also=("serve",),
            choice=_AMOUNT,
            check=lambda x: None if 0 < x <= 1 else "use the share of forwards to compute, over 0, up to 1",
        ),
    ] = None
    magcache_skip: Annotated[
        int | None,
        Option(
            "Number of forwards to skip. They are chosen so that the sum of their errors is smallest. No threshold is "
            "used.",
            LOSSY,
            also=("serve",),
            choice=_AMOUNT,
            check=at_least(0, "use a number of forwards, 0 or more"),
        ),
    ] = None
    magcache_interpolate: Annotated[
        bool,
        Option(
            "Interpolate the curve if it was measured with other --steps or --shift.", LOSSY, also=("bench", "serve")
        ),
    ] = False

    magcache_extrapolate: Annotated[
        bool,
        Option(
            "Extrapolate the residual of a skipped forward from the last two computed residuals, for up to two skips "
            "in a row. Without this option, the last residual is used again.",
            LOSSY,
            also=("serve",),
        ),
    ] = False

    def __post_init__(self) -> None:
        name, short = self.magcache, magcache_settings(self.magcache)
        if name not in ("off", "preset", "artifact") and not _CURVE_KEY.fullmatch(name) and not short:
            raise ConfigError(
                f"--magcache {name!r:.40}: use 'off', 'preset', 'artifact', the key that calibrate-magcache printed, "
                "or settings such as 'E012K2R20'"
            )
        _, *others = options_of(SkippingConfig).values()  # the first, --magcache, enables the others
        given = [option for option in others if getattr(self, option.name) != option.default]
        if name == "off" and given:
            raise ConfigError(f"{given[0].flag} needs --magcache: add --magcache preset, or drop {given[0].flag}")
        twice = [option.flag for option in given if option.name in _SHORT or option.option.choice == _AMOUNT]
        if short and twice:
            raise ConfigError(
                f"--magcache {name} and {twice[0]} exclude each other, because {name} already limits the skips: write "
                f"--magcache preset, or drop {twice[0]}"
            )
        amounts = [option.flag for option in others if option.option.choice == _AMOUNT]
        if sum(option.flag in amounts for option in given) > 1:
            raise ConfigError(f"{', '.join(amounts[:-1])} and {amounts[-1]} exclude each other: use only one of them")
        if short:
            _check_short(name, short)
        super().__post_init__()


def _check_short(name: str, settings: tuple[float, int, float]) -> None:
    """Checks the settings in a short name. Raises ConfigError."""
    for option, value in zip(_SHORT, settings, strict=True):
        try:
            options_of(SkippingConfig)[option].check_range(value)
        except ConfigError as error:
            raise ConfigError(f"--magcache {name}: {error}") from None
