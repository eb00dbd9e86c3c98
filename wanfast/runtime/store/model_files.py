"""Locates the files of a model, in one of the two public layouts: the original layout, or the layout of Diffusers.

The option --model takes one of these values:

* `tiny`: this model ships with the package.
* `a14b` or `t2v-a14b`: a published model. Its files are looked for in the artifacts folder, and then in the cache of
  the Hugging Face Hub.
* The path of a folder with any other model.

This module does not import torch.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from wanfast.runtime.config import ModelsConfig, default_artifacts_dir
from wanfast.runtime.config.option import did_you_mean
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError, foreign
from wanfast.runtime.facts.choices import EXPERTS, NAMED_MODELS, Layout
from wanfast.runtime.facts.model_spec import A14B, PUBLISHED, T2V_A14B, ModelSpec
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.store.artifacts import check_root
from wanfast.runtime.store.expert_files import SUFFIXES, NamedExpert, NamesExperts, named_experts
from wanfast.runtime.store.hub_cache import REPOS, PublishedModel, is_published, snapshots
from wanfast.runtime.store.identity import identity
from wanfast.runtime.store.model_facts import Places, read_spec
from wanfast.runtime.store.shards import shards_in

TINY = Path(__file__).parents[2] / "assets" / "tiny"
# The bytes of the files of the models that `wanfast download` fetches.
DOWNLOADED: dict[str, int] = {"a14b": 126 * 10**9, "t2v-a14b": 126 * 10**9}

Component = Literal["high_noise", "low_noise", "vae", "umt5"]
COMPONENTS: tuple[Component, ...] = ("high_noise", "low_noise", "vae", "umt5")

_NAME_ANOTHER = f"use {', '.join(NAMED_MODELS)} or a folder of weights"


_LAYOUTS: dict[Layout, Places] = {
    "original": Places(
        high_noise="high_noise_model",
        low_noise="low_noise_model",
        vae="Wan2.1_VAE.pth",
        umt5="models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer="google/umt5-xxl/tokenizer.json",
    ),
    "diffusers": Places(
        high_noise="transformer",
        low_noise="transformer_2",
        vae="vae",
        umt5="text_encoder",
        tokenizer="tokenizer/tokenizer.json",
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """This class holds a model's folder and facts; if `exists` is false, the folder does not exist yet."""

    root: Path
    layout: Layout
    spec: ModelSpec
    fix: str  # the command that gets the files
    artifacts: Path  # the folder that remembers hashes of files
    experts: tuple[NamedExpert, ...] = ()  # those that options name; they replace the folder's

    @property
    def exists(self) -> bool:
        return self.root.is_dir()

    @property
    def tokenizer(self) -> Path:
        return self.root / _LAYOUTS[self.layout].tokenizer

    def weights(self, component: Component) -> list[Path]:
        """Returns the weight files of a component; raises WanFastError if one of the files is missing."""
        if named := self.named(component):
            return named.files
        place = self.root / getattr(_LAYOUTS[self.layout], component)
        files = [place] if place.suffix == ".pth" else shards_in(place)
        for file in files or [place / "*.safetensors"]:
            _require_file(file, self.fix)
        return files

    def named(self, component: Component) -> NamedExpert | None:
        """Returns the user's own expert that replaces the model's `component`, or None.

        The user gives an expert by --high-noise-expert or --low-noise-expert. The VAE and UMT5 have no such option, so
        the result for them is always None.
        """
        return next((named for named in self.experts if named.expert == component), None)

    def require(self) -> None:
        """Raises MissingArtifactError if a file that a generation needs is missing.

        Raises CorruptArtifactError if a file cannot be read, or if UMT5 and the transformer do not fit together.
        """
        if not self.exists:
            raise MissingArtifactError(f"{self.root} is missing: {self.fix}")
        for component in COMPONENTS:
            self.weights(component)
        _require_file(self.tokenizer, self.fix)
        if self.spec.umt5.dim != self.spec.dit.text_dim:
            raise CorruptArtifactError(
                f"{self.root}: the transformer reads text embeddings of size {self.spec.dit.text_dim}, but UMT5 gives "
                f"{self.spec.umt5.dim}: {self.fix}"
            )

    def identify(self) -> None:
        """Hashes the model's files that are not hashed yet.

        The parent calls this method before the ranks start, so that no rank has to wait. If large files are hashed, a
        note tells the user how long this may take.
        """
        assert self.fingerprints

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Returns {component: hash of its files}, with the key "tokenizer" for the tokenizer.

        The hashes do not depend on the model's folder, so a copied model has the same hashes. The first process that
        reads this property hashes all files, which takes about one second for each GB. Later processes read the stored
        hashes. Raises WanFastError if a file is missing.
        """
        tokenizer = identity([self.tokenizer], self.artifacts)
        return {**{name: self.fingerprint(name) for name in COMPONENTS}, "tokenizer": tokenizer}

    @remembered
    def fingerprint(self, component: Component) -> str:
        """Returns one hash of a component's weight files; raises WanFastError if a file is missing."""
        if named := self.named(component):
            return named.digest(self.artifacts)
        return identity(self.weights(component), self.artifacts)


def or_tiny(spec: ModelSpec) -> str:
    """Returns the end of a fix for a user who has no weights of `spec`, or no GPU: what --model tiny can do instead."""
    if spec.takes_images:
        return ", or use --model tiny, which runs on any CPU"
    return " (--model tiny runs on any CPU, but it needs an --image: it makes no video from text alone)"


class Models(NamesExperts, Protocol):
    """This interface is for a config that names a model, an artifacts folder and, optionally, files of experts."""

    @property
    def model(self) -> str: ...
    @property
    def artifacts_dir(self) -> str: ...


def locate_for(models: Models) -> ModelFiles:
    """Locates the model of a config, with the experts that the config names. Raises WanFastError."""
    return locate(models.model, models.artifacts_dir, named_experts(models))


@remembered
def locate(model: str, artifacts_dir: str, experts: tuple[NamedExpert, ...] = ()) -> ModelFiles:
    """Locates the model that `--model` names, and reads its facts.

    `artifacts_dir`: the artifacts folder. `experts`: the user's own experts, which replace the model's experts.
    If the weights of a published model are missing, the `exists` of the result is False. Other problems raise an error:

    * ConfigError: `model` is a file. Or it is a folder, but does not hold a Wan2.2 model. Or it is one word, such as a
      misspelled name, and no such folder exists.
    * MissingArtifactError: `model` is a path with several parts, and no such folder exists.
    * CorruptArtifactError: the model's facts are damaged or contradict each other.
    """
    artifacts, published = Path(artifacts_dir).absolute(), A14B
    check_root(artifacts)
    if model == "tiny":
        spec = read_spec(TINY, _LAYOUTS["diffusers"])
        return ModelFiles(TINY, "diffusers", spec, "reinstall wanfast", artifacts, experts)
    if is_published(model):
        published, root = PUBLISHED[model], _published_root(model, artifacts, experts)
        where = "" if model == ModelsConfig.model else f" --model {model}"
        where += " --layout diffusers" if root.name == checkpoints(model, "diffusers").name else ""
        is_default = str(Path(artifacts_dir).absolute()) == default_artifacts_dir()
        where += "" if is_default else f" --artifacts-dir {shlex.quote(artifacts_dir)}"
        fix = (
            f"run `wanfast download{where}` ({DOWNLOADED[model] / 1e9:.0f} GB), or give the weights' folder as "
            "--model FOLDER"
        )
        if not root.is_dir():
            return ModelFiles(root, "original", published, f"{fix}{or_tiny(published)}", artifacts, experts)
    else:
        fix = "copy the whole folder again"
        with foreign(f"--model {model!r:.60}", _NAME_ANOTHER):
            root = Path(model).absolute()
            is_missing, is_file = not root.is_dir(), root.is_file()
        if is_file:
            raise ConfigError(f"--model {model!r} is a file: {_instead_of(root)}")
        if is_missing and root.parent == Path.cwd():
            raise ConfigError(
                f"--model {root.name}: no such folder: {did_you_mean(root.name, NAMED_MODELS, _NAME_ANOTHER)}"
            )
        if is_missing:
            raise MissingArtifactError(f"--model {model!r}: no such folder; {_NAME_ANOTHER}")
    signs = _signs(experts)
    for layout, sign in signs.items():
        with foreign(f"--model {model!r:.60}", "make the folder readable"):
            is_here = (root / sign).exists()
        if is_here:
            spec = read_spec(root, _LAYOUTS[layout], published)
            if spec.dit.out_channels != spec.vae.latent_channels:
                raise CorruptArtifactError(
                    f"--model {model}: its transformer makes latents of {spec.dit.out_channels} channels, but its VAE "
                    f"has {spec.vae.latent_channels}: {fix}"
                )
            _check_channels(model, spec)
            return ModelFiles(root, layout, spec, fix, artifacts, experts)
    raise ConfigError(f"--model {model}: {root} has neither {' nor '.join(signs.values())}; give a Wan2.2 folder")


def _check_channels(model: str, spec: ModelSpec) -> None:
    """Raises ConfigError if the transformer reads other channels than a model from images or from text alone reads."""
    latents, from_text = spec.vae.latent_channels, T2V_A14B.dit.in_channels
    from_images = spec.dit.out_channels + spec.vae.temporal_stride + latents
    if spec.dit.in_channels != (from_images if spec.takes_images else min(latents, from_text)):
        raise ConfigError(
            f"--model {model}: its transformer reads {spec.dit.in_channels} channels, but videos from images need "
            f"{from_images}, and videos from text alone need {from_text}: use an I2V or a T2V model of the A14B kind"
        )


def _signs(experts: tuple[NamedExpert, ...]) -> dict[Layout, str]:
    """Returns what a model in each layout holds: its first expert, or its VAE if both experts come from elsewhere."""
    if len(experts) == len(EXPERTS):
        return {layout: places.vae for layout, places in _LAYOUTS.items()}
    return {layout: f"{places.high_noise}/" for layout, places in _LAYOUTS.items()}


def _instead_of(file: Path) -> str:
    """Returns what to type instead of --model with a file: the options for experts, with both files of a pair."""
    if file.suffix not in SUFFIXES:
        return "give the folder that holds the whole model"
    other = file.with_name(re.sub("|".join(_HALVES), lambda found: _HALVES[found[0]], file.name))
    pair = [file, other if other != file and other.is_file() else Path("FILE")]
    if "low" in file.name.lower() and "high" not in file.name.lower():
        pair.reverse()
    line = shlex.join(["--high-noise-expert", str(pair[0]), "--low-noise-expert", str(pair[1])])
    return f"use `{line}`, and give --model the folder with the VAE and UMT5, or leave out --model"


_HALVES = {"high": "low", "High": "Low", "HIGH": "LOW", "low": "high", "Low": "High", "LOW": "HIGH"}


def checkpoints(model: PublishedModel, layout: Layout) -> Path:
    """Returns the folder of a downloaded model, relative to the artifacts folder."""
    return Path("checkpoints", REPOS[model][layout].rpartition("/")[2])


def _published_root(model: PublishedModel, artifacts: Path, experts: tuple[NamedExpert, ...]) -> Path:
    """Returns the first folder that holds a model; if there is none, the original layout's in the artifacts folder."""
    own = [artifacts / checkpoints(model, layout) for layout in REPOS[model]]
    signs = _signs(experts).values()
    with foreign(f"--artifacts-dir {str(artifacts)!r:.60}", "give a folder that can be read"):
        found = next((root for root in own if any((root / sign).exists() for sign in signs)), None)
    return found or next((root for layout in REPOS[model] for root in _cached(model, layout, experts)), own[0])


def _cached(model: PublishedModel, layout: Layout, experts: tuple[NamedExpert, ...]) -> Iterator[Path]:
    """Yields the folders of the Hugging Face cache that hold a model's published weights.

    An expert in `experts` comes from another file, so a folder need not hold this expert.
    """
    for root in snapshots(model, layout):
        with suppress(MissingArtifactError, CorruptArtifactError):
            ModelFiles(root, layout, PUBLISHED[model], "", root, experts).require()
            yield root


def _require_file(file: Path, fix: str) -> None:
    """Raises WanFastError if a file is missing or cannot be read."""
    with foreign(str(file), fix, CorruptArtifactError):
        is_missing, is_closed = not file.is_file(), not os.access(file, os.R_OK)
    if is_missing:
        raise MissingArtifactError(f"{file} is missing: {fix}")
    if is_closed:
        raise CorruptArtifactError(f"{file} cannot be read by this user: change the file's mode, or {fix}")
