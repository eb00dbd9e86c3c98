"""Finds LoRA files, computes their hashes, reads their headers, and checks that each file fits its option.

A LoRA is named by --lora (for both experts), --lora-high-noise or --lora-low-noise. The tensors of a LoRA are matched
with the model's tensors only when an expert is loaded, because only `models.dit` knows the names and shapes of the
model's tensors.
This module does not import torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open

from wanfast.runtime.config.models import ModelsConfig, parse_lora
from wanfast.runtime.config.option import flag
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import EXPERTS, Expert
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.store.identity import digest_of
from wanfast.runtime.store.lora_pairs import own_folder

_EXPERTS_OF: Mapping[str, tuple[Expert, ...]] = {
    "lora": ("high_noise", "low_noise"),
    "lora_high_noise": ("high_noise",),
    "lora_low_noise": ("low_noise",),
}
_SECOND = "transformer_2."  # Diffusers' name of the low-noise expert; its "transformer." may mean either expert
_CONFIG = "adapter_config.json"  # PEFT writes alpha into this file beside the tensors
_PEFT = "base_model.model."
# Keys of Wan2.1's layers for CLIP image features, in both layouts; Wan2.2-I2V-A14B has no such layers.
_IMAGE_TOWER = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder)(?=[._])"
)
_OTHERS = {
    "DoRA": re.compile(r"\.(?:dora_scale|lora_magnitude_vector)(?:\.|$)"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
}


class NamesLoras(Protocol):
    """This interface stands for any config that may name LoRA files."""

    @property
    def lora(self) -> tuple[str, ...]: ...
    @property
    def lora_high_noise(self) -> tuple[str, ...]: ...
    @property
    def lora_low_noise(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Lora:
    """This class holds one LoRA file, its strength, and the option that names it."""

    option: str
    file: Path
    strength: float
    sha256: str

    @property
    def flag(self) -> str:
        return flag(self.option)

    def has_expert(self, expert: Expert) -> bool:
        return expert in _EXPERTS_OF[self.option]

    def words(self) -> tuple[str, str]:
        """Returns the words that name this LoRA on the command line."""
        return self.flag, str(self.file) if self.strength == 1 else f"{self.file}@{self.strength:.15g}"


def loras_of(models: ModelsConfig) -> tuple[Lora, ...]:
    """Returns the LoRAs of `models` in the order in which they are merged.

    `models.lora_sha256` must already hold the hashes of the LoRA files.
    """
    return tuple(
        Lora(option, file, strength, sha256)
        for (option, file, strength), sha256 in zip(_given(models), models.lora_sha256, strict=True)
    )


def inputs_of(loras: Iterable[Lora], expert: Expert) -> list[list[str | float]]:
    """Returns [digest, strength] of each LoRA of an expert, as inputs of an artifact's key."""
    return [[lora.sha256, lora.strength] for lora in loras if lora.has_expert(expert)]


def find_loras(named: NamesLoras, artifacts: Path) -> tuple[Lora, ...]:
    """Returns the LoRAs that a config names, with their hashes, in the order in which they are merged.

    Raises ConfigError for a missing file, and for a file whose name or keys show that it needs another option. Raises
    CorruptArtifactError for a file that holds no LoRA.
    """
    return tuple(
        Lora(option, file, strength, _checked(option, file, artifacts)) for option, file, strength in _given(named)
    )


def _given(config: NamesLoras) -> list[tuple[str, Path, float]]:
    """Returns (option, file, strength) of each LoRA that a config names."""
    texts = {
        "lora": config.lora,
        "lora_high_noise": config.lora_high_noise,
        "lora_low_noise": config.lora_low_noise,
    }
    parsed = [(option, *parse_lora(text)) for option, each in texts.items() for text in each]
    return [(option, Path(path), strength) for option, path, strength in parsed]


def _checked(option: str, file: Path, artifacts: Path) -> str:
    """Returns the sha256 of a file, or for a file of PEFT one hash of this sha256 and that of the config beside it."""
    header = read_header(file, flag(option))
    _check_expert(option, file, header)
    return digest_of([file, *([header.config] if header.config else [])], artifacts, flag(option))


@dataclass(frozen=True)
class LoraHeader:
    """This class holds the shapes and dtypes of a LoRA file's tensors, and the file's metadata."""

    tensors: Mapping[str, tuple[list[int], str]]  # shape, and dtype as safetensors names it
    metadata: Mapping[str, str]
    num_dropped: int  # tensors for CLIP image features, which are not among `tensors`
    config: Path | None  # PEFT's, beside the file

    def of_expert(self, expert: Expert) -> list[str]:
        """Returns the keys of the tensors for one expert.

        If some keys begin with "transformer_2.", these keys are for the low-noise expert, and all other keys are for
        the high-noise expert. Otherwise, all keys are for both experts.
        """
        second = [key for key in self.tensors if key.startswith(_SECOND)]
        if expert == "low_noise" and second:
            return second
        return [key for key in self.tensors if not key.startswith(_SECOND)]


@remembered
def read_header(file: Path, option: str) -> LoraHeader:
    """Reads the header of a LoRA file that `option` names.

    Raises ConfigError for a missing file, and CorruptArtifactError for a file that holds no LoRA.
    """
    subject = f"{option} {file}"
    with foreign(subject, "give a file that can be read"):
        is_file = file.is_file()
    if not is_file:
        raise ConfigError(f"{subject}: no such file: check the path")
    with (
        foreign(subject, "it is damaged, or is not a safetensors file: download it again", CorruptArtifactError),
        safe_open(file, framework="np") as handle,
    ):
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        tensors = {key: (each.get_shape(), each.get_dtype()) for key, each in slices.items()}
        metadata = handle.metadata() or {}
    kept = {key: facts for key, facts in tensors.items() if not _IMAGE_TOWER.search(key)}
    for kind, pattern in _OTHERS.items():
        if found := next(filter(pattern.search, kept), None):
            raise CorruptArtifactError(
                f"{subject}: tensor {found!r} belongs to a {kind}: only LoRAs can be merged: use a LoRA of this model"
            )
    if not kept:
        raise CorruptArtifactError(f"{subject}: the file holds no tensor for this model: use a LoRA of this model")
    config = file.with_name(_CONFIG)
    of_peft = any(key.startswith(_PEFT) for key in kept) and config.is_file()
    return LoraHeader(kept, metadata, len(tensors) - len(kept), config if of_peft else None)


def _check_expert(option: str, file: Path, header: LoraHeader) -> None:
    """Raises ConfigError if the keys or the name of a file say that it is for another expert than the option's."""
    experts = _EXPERTS_OF[option]
    in_keys = [expert for expert in _EXPERTS_OF["lora"] if header.of_expert(expert)]
    if not {*in_keys} & {*experts}:
        why = "its tensors belong to the other expert"
        raise ConfigError(f"{flag(option)} {file}: {why}: use {flag(f'lora_{in_keys[0]}')}")
    in_name = expert_in(file.name)
    if in_name is not None and experts != (in_name,):
        fix = f"use {flag(f'lora_{in_name}')}, or rename the file"
        raise ConfigError(
            f"{flag(option)} {file}: the file's name says that the LoRA is only for "
            f"the {in_name.replace('_', '-')} expert: {fix}"
        )


def expert_in(name: str) -> Expert | None:
    """Returns the expert that a file's name mentions, or None if the name mentions none or both."""
    halves = set(re.findall(r"(high|low)[-_ ]?noise", name.lower()))
    return {"high": EXPERTS[0], "low": EXPERTS[1]}[halves.pop()] if len(halves) == 1 else None


def lora_notes(models: ModelsConfig, root: Path) -> list[str]:
    """Returns the notes for the user about LoRAs of a run with the model in `root`.

    A note names each LoRA file with dropped tensors: those for CLIP image features, because the model has no layers for
    them. Another note says that the user's LoRAs replace those that the model has for the recipe.
    """
    loras = loras_of(models)
    headers = [(lora, read_header(lora.file, lora.flag)) for lora in loras]
    dropped = [
        f"{lora.flag} {lora.file.name}: the tensors for Wan2.1's CLIP image features ({header.num_dropped} in all) "
        "are dropped, because this model has no layers for such features"
        for lora, header in headers
        if header.num_dropped
    ]
    unused = " ".join(_unused(models, root, {lora.file for lora in loras}))
    if not unused:
        return dropped
    whose = f"--recipe {models.recipe}: your LoRAs replace the model's own LoRAs for it"
    return [*dropped, f"{whose}: to use these too, add {unused}"]


def _unused(models: ModelsConfig, root: Path, used: set[Path]) -> Iterator[str]:
    """Yields an option with each LoRA that the model in `root` has for the recipe, but that is not among `used`.

    An expert whose weights an option names needs no LoRA for the recipe.
    """
    if models.recipe is None:
        return
    folder = own_folder(models.recipe, root)
    for expert in RECIPES[models.recipe].distilled:
        file = folder / f"{expert}.safetensors"
        if not getattr(models, f"{expert}_expert") and file.is_file() and file not in used:
            yield f"{flag(f'lora_{expert}')} {shlex.quote(str(file))}"
