"""Makes the configs of few-step recipes, with distilled LoRAs from the subfolder `loras` of a model's folder."""

from __future__ import annotations

from pathlib import Path

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.config.recipes import OF_GRID, RECIPES
from wanfast.runtime.facts.choices import RecipeName
from wanfast.runtime.store.loras import find_loras
from wanfast.runtime.store.model_files import ModelFiles

PAIR: RecipeName = "lightning-4"  # the recipe for which the tiny model's pair of LoRAs is trained


def missing_lora(files: ModelFiles, recipe: RecipeName, pair: RecipeName) -> Path | None:
    """Returns the first LoRA file that `recipe` needs and that does not exist, or None if all exist.

    `pair`: the recipe for which the LoRAs were trained, as in `distilled`.
    """
    return next((file for file in _files(files, recipe, pair).values() if not file.is_file()), None)


def undistilled(config: EffectiveConfig, recipe: RecipeName) -> EffectiveConfig:
    """Returns a config with the noise levels, the solver and the guidance of `recipe`, and the weights of `config`."""
    return config.replace(**dict.fromkeys(OF_GRID), **RECIPES[recipe].given({}))


def distilled(config: EffectiveConfig, recipe: RecipeName, files: ModelFiles, pair: RecipeName) -> EffectiveConfig:
    """Returns `config` with the options of `recipe`, and with the LoRAs that were trained for the recipe `pair`.

    These LoRAs lie in `loras/<pair>/` in the folder of the model's weights: one file for each expert. An expert gets
    its LoRA only if `recipe` needs distilled weights for this expert. Raises ConfigError if a needed LoRA is missing.
    """
    loras = {f"lora_{expert}": (str(file),) for expert, file in _files(files, recipe, pair).items()}
    named = undistilled(config, recipe).replace(recipe=recipe, **loras)
    return named.replace(lora_sha256=tuple(lora.sha256 for lora in find_loras(named.models, files.artifacts)))


def _files(files: ModelFiles, recipe: RecipeName, pair: RecipeName) -> dict[str, Path]:
    return {expert: files.root / "loras" / pair / f"{expert}.safetensors" for expert in RECIPES[recipe].distilled}
