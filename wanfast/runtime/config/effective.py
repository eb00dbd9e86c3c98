"""Turns the options of a request into an effective config, which has a value for every option, in five frozen parts.

Each option is defined once, as a field of its part. `Options` maps the names of given options to their values.
`EffectiveConfig.of` adds the defaults; some defaults are the model's own. `EffectiveConfig.of` refuses values that are
wrong for every model; the error names the option. The ranks read the effective config. The JSON beside a video records
the config, and `--from` runs the recorded config again. Some fields of `skipping` and `ranks` may be None at first:
the curve, the limits of skips, the mesh, and which weights are sharded or offloaded. The package `runtime.planning`
fills these fields later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wanfast.runtime.config.models import ModelsConfig, default_artifacts_dir
from wanfast.runtime.config.option import OptionField, Options, options_of, refuse_unknown
from wanfast.runtime.config.ranks import RanksConfig
from wanfast.runtime.config.recipes import OF_GRID, RECIPES, has_levels, with_recipe, without_lossy_attention
from wanfast.runtime.config.skipping import SkippingConfig
from wanfast.runtime.config.video import CPU_SEEDS, OutputConfig, VideoConfig
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import LOSSY_ATTENTION, Command, in_8_bits
from wanfast.runtime.facts.model_spec import ModelSpec

_OLDER_MODELS = {"vae_precision": "fp32"}  # what versions did whose sidecars lack a field
NO_VIDEO: Options = {"prompt": "none"}  # required of a video, but not to place ranks or to compile


@dataclass(frozen=True, kw_only=True)
class EffectiveConfig:
    """This class holds the values of all options of one video; each field holds the options of one subject."""

    video: VideoConfig
    models: ModelsConfig
    skipping: SkippingConfig | None
    ranks: RanksConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        if self.video.noise_device == "cuda" and self.ranks.device == "cpu":
            raise ConfigError(
                "--noise-device cuda needs --device cuda and a GPU: drop --noise-device to draw noise on the CPU"
            )
        if in_8_bits(self.models.quantize) and self.ranks.dit_fsdp == "on":
            raise ConfigError(
                f"--dit-fsdp on and --quantize {self.models.quantize} exclude each other, because "
                "quantized experts are never sharded: drop one of the two"
            )

    @classmethod
    def of(cls, given: Options, own: ModelSpec, **answers: Any) -> EffectiveConfig:
        """Returns the effective config of the `given` options; if a recipe is given, its options are added to them.

        `answers`: values that the program chose for options that are not given, such as the seed. Each remaining option
        gets the model's own default in `own`, if there is one, or else the option's default. The option's default is 0
        for the seed, "cuda" for the device, and "" for the image and the prompt.
        Raises ConfigError, which names the option.
        """
        chosen = {name: value for name, value in with_recipe(accepted(given)).items() if value is not None}
        values = {name: getattr(own, name) for name, option in OPTIONS.items() if option.option.own}
        if "sigmas" in chosen:
            values |= dict.fromkeys(OF_GRID)
        values |= (
            {"image": "", "prompt": "", "device": "cuda", "seed": 0, "artifacts_dir": default_artifacts_dir()}
            | answers
            | chosen
        )
        return cls._from_flat(values)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> EffectiveConfig:
        """Returns the config of a document that `to_json` made, or that an older version wrote as a flat mapping.

        Raises ConfigError, KeyError or TypeError for any other document.
        """
        if "video" not in document:
            unsettled = ("magcache_joint", "auto")  # a default of older versions, which skipped nothing then
            given = dict(item for item in document.items() if item != unsettled)
            return cls._from_flat(_OLDER_MODELS | _with_seed_that_acts(given))
        models = {**_OLDER_MODELS, **document["models"]}
        document = {**document, "models": models, "video": _with_seed_that_acts(document["video"])}
        parts = {name: PARTS[name](**document[name]) for name in PARTS if document[name] is not None}
        return cls(**{"skipping": None, **parts})

    @classmethod
    def _from_flat(cls, values: Mapping[str, Any]) -> EffectiveConfig:
        parts: dict[str, Any] = {}
        for name, part in PARTS.items():
            fields = {field.name for field in dataclasses.fields(part)}
            parts[name] = part(**{field: value for field, value in values.items() if field in fields})
        if parts["skipping"].magcache == "off":
            parts["skipping"] = None
        return cls(**parts)

    def to_json(self) -> dict[str, Any]:
        """Returns {part: {option: value}} of the five parts; the value of `skipping` is None if --magcache is off."""
        return dataclasses.asdict(self)

    def options(self) -> dict[str, Any]:
        """Returns a flat mapping {option: value} over all parts; `EffectiveConfig.of` takes this mapping."""
        return {name: getattr(part, name) for part in self._parts() for name in options_of(type(part))}

    def replace(self, **values: Any) -> EffectiveConfig:
        """Returns a copy in which the named fields, of any of the five parts, have the new `values`."""
        own = {field.name: getattr(part, field.name) for part in self._parts() for field in dataclasses.fields(part)}
        return self._from_flat(own | values)

    def _parts(self) -> list[Any]:
        return [getattr(self, name) or SkippingConfig() for name in PARTS]


def _with_seed_that_acts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with the seed that acted, because older versions accepted seeds of 63 bits."""
    seed = values["seed"]
    acts = isinstance(seed, int) and seed >= 0 and values.get("noise_device", "cpu") == "cpu"
    return {**values, "seed": seed % CPU_SEEDS if acts else seed}


PARTS: dict[str, Any] = {
    "models": ModelsConfig,
    "video": VideoConfig,
    "skipping": SkippingConfig,
    "ranks": RanksConfig,
    "output": OutputConfig,
}


def accepted(given: Options) -> dict[str, Any]:
    """Checks the values of the `given` options, and returns all given options; a path object becomes a str.

    Raises ConfigError, which names the option.
    """
    refuse_unknown(given, OPTIONS)
    return {name: OPTIONS[name].accept(value) for name, value in given.items()}


def of_command(given: Options, command: Command) -> dict[str, Any]:
    """Returns the options with which a warmup or a calibration runs: the `given` ones and those of a given recipe.

    A recipe's option is left out if `command` does not have this option. `recipe` itself is left out too. A calibration
    measures exact attention, so it also leaves out a recipe's lossy attention.
    Raises ConfigError for a wrong option; the error names this option.
    """
    given = accepted(given)
    _refuse_lossy_attention(given, command)
    chosen = with_recipe(given)
    if chosen.get("attention") in LOSSY_ATTENTION and command != "warmup":  # a recipe's; these measure exact attention
        chosen = {**without_lossy_attention(chosen), **given}
    recipe = chosen.pop("recipe", None)
    if recipe and RECIPES[recipe].distilled and command == "calibrate-magcache":
        raise ConfigError(
            f"--recipe {recipe}: this recipe uses distilled weights, but a curve is measured without them: drop "
            "--recipe"
        )
    if recipe and has_levels(recipe) and command == "calibrate-attention":
        raise ConfigError(
            f"--recipe {recipe}: a plan of attention is calibrated with --steps and --shift, but this recipe has a "
            "list of noise levels: drop --recipe"
        )
    return {name: value for name, value in chosen.items() if name in given or command in OPTIONS[name].option.also}


def _refuse_lossy_attention(given: Options, command: Command) -> None:
    """Raises ConfigError if --attention is lossy and `command` is one that needs exact attention."""
    if (kernel := given.get("attention")) in LOSSY_ATTENTION and command != "warmup":
        raise ConfigError(f"--attention {kernel}: `wanfast {command}` measures exact attention: use --attention auto")


OPTIONS: dict[str, OptionField] = {name: option for part in PARTS.values() for name, option in options_of(part).items()}
