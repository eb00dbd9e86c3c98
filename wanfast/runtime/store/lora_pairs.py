"""Names the published pairs of LoRAs that distil the experts to four steps.

`wanfast download --lora NAME` fetches a pair into <artifacts>/loras/NAME. The user then gives the pair's files by
--lora-high-noise and --lora-low-noise. `wanfast bench` takes a downloaded pair by itself.

Some recipes need distilled weights. If the user gives none for an expert, the expert's LoRA is taken from the folder of
the model: <model>/loras/RECIPE/EXPERT.safetensors. If a model has no folder for `hybrid`, the folder of `lightning-4`
is used. If the file is missing too, the recipe is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.config.option import flag
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import EXPERTS, Expert, RecipeName
from wanfast.runtime.facts.model_spec import ModelSpec


@dataclass(frozen=True)
class LoraPair:
    """This class says where the LoRA of each expert lies on the Hugging Face Hub."""

    repo: str
    files: Mapping[Expert, str]


PAIRS: Mapping[str, LoraPair] = MappingProxyType(
    {
        "lightning-seko-v1": LoraPair(
            "lightx2v/Wan2.2-Lightning",
            {expert: f"Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/{expert}_model.safetensors" for expert in EXPERTS},
        ),
        "lightx2v-1022": LoraPair(
            "lightx2v/Wan2.2-Distill-Loras",
            {expert: f"wan2.2_i2v_A14b_{expert}_lora_rank64_lightx2v_4step_1022.safetensors" for expert in EXPERTS},
        ),
    }
)
_TRAINED_FOR: Mapping[RecipeName, RecipeName] = MappingProxyType({"hybrid": "lightning-4"})  # whose LoRAs serve too
_PAIR_OF = {"lightning-4": "lightning-seko-v1", "lightning-8": "lightning-seko-v1", "hybrid": "lightning-seko-v1"}


def folder_of(name: str, artifacts: Path) -> Path:
    """Returns the folder of a downloaded pair; the folder may be missing."""
    return artifacts / "loras" / name


def words_of(name: str, artifacts: Path, experts: tuple[Expert, ...] = EXPERTS) -> str:
    """Returns the part of a command line that names the LoRAs of a pair: an option and a file for each expert."""
    files = {expert: folder_of(name, artifacts) / PAIRS[name].files[expert] for expert in experts}
    return " ".join(f"{flag(f'lora_{expert}')} {shlex.quote(str(file))}" for expert, file in files.items())


def own_folder(recipe: RecipeName, root: Path) -> Path:
    """Returns the folder of the LoRAs that the model in `root` has for a recipe; the folder may be missing.

    If the folder of `hybrid` is missing, and that of `lightning-4` exists, the result is the latter.
    """
    own, other = (root / "loras" / name for name in (recipe, _TRAINED_FOR.get(recipe, recipe)))
    return other if other.is_dir() and not own.is_dir() else own


def own_loras(models: ModelsConfig, root: Path) -> dict[str, tuple[str, ...]]:
    """Returns {option: (path,)} of the LoRAs that the model in `root` has for the config's recipe.

    An option is, for example, "lora_low_noise". The path is EXPERT.safetensors in the recipe's folder (`own_folder`).
    An expert without this file is left out, and so is an expert for which the user gives distilled weights.
    """
    if models.recipe is None:
        return {}
    folder = own_folder(models.recipe, root)
    files = {expert: folder / f"{expert}.safetensors" for expert in _undistilled(models)}
    return {f"lora_{expert}": (str(file),) for expert, file in files.items() if file.is_file()}


def require_distilled(models: ModelsConfig, spec: ModelSpec, root: Path) -> None:
    """Raises ConfigError if the recipe needs distilled weights of an expert, and the expert has none.

    An expert has them if an option names a LoRA or a file of weights for the expert, or if the model in `root` has a
    LoRA for the recipe. Whether these weights are distilled is not checked, because a file does not say so.
    """
    own = own_loras(models, root)
    missing = tuple(expert for expert in _undistilled(models) if f"lora_{expert}" not in own)
    if models.recipe is None or not missing:
        return
    which = "both experts" if len(missing) == len(EXPERTS) else f"the {missing[0].replace('_', '-')} expert"
    name, artifacts = pair_for(models.recipe, spec), Path(models.artifacts_dir)
    if name is None:
        loras = " ".join(f"{flag(f'lora_{expert}')} FILE" for expert in missing)
        whole = " ".join(f"{flag(f'{expert}_expert')} FILE" for expert in missing)
        fix = f"add `{loras}`, or `{whole}`"
    else:
        fix = f"add `{words_of(name, artifacts, missing)}`"
        if not all((folder_of(name, artifacts) / PAIRS[name].files[expert]).is_file() for expert in missing):
            fix = f"run `wanfast download --lora {name}`, then {fix}"
    raise ConfigError(f"--recipe {models.recipe} needs distilled weights of {which}: {fix}")


def pair_for(recipe: RecipeName, spec: ModelSpec) -> str | None:
    """Returns the name of the published pair for a recipe; None if no pair is known for the recipe or the model."""
    return _PAIR_OF.get(recipe) if spec.needs_gpu and spec.takes_images else None  # the pairs are of the A14B


def downloaded_loras(recipe: RecipeName, spec: ModelSpec, artifacts: Path) -> dict[str, tuple[str, ...]]:
    """Returns {option: (path,)} of the published pair for a recipe, for the experts that the recipe distils.

    An option is, for example, "lora_low_noise". The result is empty if no pair is known or if a file is missing.
    """
    if (name := pair_for(recipe, spec)) is None:
        return {}
    files = {e: folder_of(name, artifacts) / PAIRS[name].files[e] for e in RECIPES[recipe].distilled}
    found = all(file.is_file() for file in files.values())
    return {f"lora_{expert}": (str(file),) for expert, file in files.items()} if found else {}


def is_distilled(models: ModelsConfig) -> bool:
    """Returns False if the recipe needs distilled weights of an expert for which the user gives none, else True.

    Without a recipe, the result is True.
    """
    return not _undistilled(models)


def _undistilled(models: ModelsConfig) -> tuple[Expert, ...]:
    """Returns the experts for which the recipe needs distilled weights, and the user gives none."""
    needed = RECIPES[models.recipe].distilled if models.recipe else ()
    return tuple(expert for expert in needed if not _may_be_distilled(models, expert))


def _may_be_distilled(models: ModelsConfig, expert: Expert) -> bool:
    """Returns whether an expert may have distilled weights: a LoRA, or weights that an option names."""
    return bool(models.lora or getattr(models, f"lora_{expert}") or getattr(models, f"{expert}_expert"))
