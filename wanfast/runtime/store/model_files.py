"""Locates a model's files and reads its facts from a folder in either of the two public layouts. Torch-free.

`tiny` ships with the package. `a14b` is the published repository, in either layout: in the artifacts folder, or else in
the cache of the Hugging Face Hub, where another program may have put it. Any other name is a path.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from wanfast.runtime.errors import ConfigError, CorruptArtifactError, MissingArtifactError
from wanfast.runtime.facts.model_spec import A14B, DiTSpec, ModelSpec, UMT5Spec, VAESpec
from wanfast.runtime.store.hub_cache import REPOS, Layout, name_of, snapshots
from wanfast.runtime.store.identity import identity

TINY = Path(__file__).parents[2] / "assets" / "tiny"
A14B_FOLDER = "checkpoints/Wan2.2-I2V-A14B"  # below the artifacts folder
A14B_DIFFUSERS_FOLDER = f"{A14B_FOLDER}-Diffusers"  # the other layout: used if the first folder is missing
A14B_BYTES = 126 * 10**9  # the total size of the files that are read

Component = Literal["high_noise", "low_noise", "vae", "umt5"]
COMPONENTS: tuple[Component, ...] = ("high_noise", "low_noise", "vae", "umt5")

_FACTS_FILE = "wanfast.json"


@dataclass(frozen=True, kw_only=True)
class _Places:
    """This class names the place of each component in one layout: a folder of shards, or a file."""

    high_noise: str
    low_noise: str
    vae: str
    umt5: str
    tokenizer: str


_LAYOUTS: dict[Layout, _Places] = {
    "original": _Places(
        high_noise="high_noise_model",
        low_noise="low_noise_model",
        vae="Wan2.1_VAE.pth",
        umt5="models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer="google/umt5-xxl/tokenizer.json",
    ),
    "diffusers": _Places(
        high_noise="transformer",
        low_noise="transformer_2",
        vae="vae",
        umt5="text_encoder",
        tokenizer="tokenizer/tokenizer.json",
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """This class holds a model's folder and facts; if `exists` is false, the folder is still missing."""

    root: Path
    layout: Layout
    spec: ModelSpec
    fix: str  # the command that gets the files
    artifacts: Path  # the folder that remembers hashes of files

    @property
    def exists(self) -> bool:
        return self.root.is_dir()

    @property
    def tokenizer(self) -> Path:
        return self.root / _LAYOUTS[self.layout].tokenizer

    def weights(self, component: Component) -> list[Path]:
        """Returns the weight files of a component; raises MissingArtifactError if one of the files is missing."""
        place = self.root / getattr(_LAYOUTS[self.layout], component)
        files = [place] if place.suffix == ".pth" else _shards(place)
        for file in files or [place / "*.safetensors"]:
            if not file.is_file():
                raise MissingArtifactError(f"{file} is missing: {self.fix}")
        return files

    def require(self) -> None:
        """Raises MissingArtifactError if a file that a generation reads is missing."""
        if not self.exists:
            raise MissingArtifactError(f"{self.root} is missing: {self.fix}")
        for component in COMPONENTS:
            self.weights(component)
        if not self.tokenizer.is_file():
            raise MissingArtifactError(f"{self.tokenizer} is missing: {self.fix}")

    def identify(self) -> None:
        """Hashes what is not hashed yet, so that the user sees why it takes a minute, and no rank waits for it."""
        assert self.fingerprints

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Returns the identity of each component's content, which is the same for a copy in another folder.

        The first process that asks reads all files, which takes about a second a GB; later ones remember.
        """
        tokenizer = identity([self.tokenizer], self.artifacts)
        return {**{name: self.fingerprint(name) for name in COMPONENTS}, "tokenizer": tokenizer}

    def fingerprint(self, component: Component) -> str:
        """Returns the identity of one component; raises MissingArtifactError if a file is missing."""
        return identity(self.weights(component), self.artifacts)


def locate(model: str, artifacts_dir: str) -> ModelFiles:
    """Returns the files of `--model`.

    Raises MissingArtifactError (no such folder), ConfigError (no image-to-video model in it) and CorruptArtifactError
    (a damaged file of facts).
    """
    artifacts = Path(artifacts_dir).absolute()
    if model == "tiny":
        return ModelFiles(TINY, "diffusers", _read_spec(TINY, "diffusers"), "reinstall wanfast", artifacts)
    if model == "a14b":
        root = _a14b_root(artifacts)
        where = " --layout diffusers" if root.name == Path(A14B_DIFFUSERS_FOLDER).name else ""
        where += "" if artifacts_dir == "artifacts" else f" --artifacts-dir {shlex.quote(artifacts_dir)}"
        fix = (
            f"run `wanfast download{where}` ({A14B_BYTES / 1e9:.0f} GB), or give the weights' folder as --model FOLDER"
        )
        if not root.is_dir():
            return ModelFiles(root, "original", A14B, fix, artifacts)
    else:
        root, fix = Path(model).expanduser().absolute(), "copy the whole folder again"
        if not root.is_dir():
            raise MissingArtifactError(f"--model {model!r}: no such folder; use tiny, a14b or a folder of weights")
    for layout in _LAYOUTS:
        if (root / _LAYOUTS[layout].high_noise).is_dir():
            spec = _read_spec(root, layout)
            needed = spec.dit.out_channels + spec.vae.temporal_stride + spec.vae.latent_channels
            if spec.dit.in_channels != needed:
                raise ConfigError(
                    f"--model {model}: its transformer reads {spec.dit.in_channels} channels, but image-to-video needs "
                    f"{needed}: use an I2V model"
                )
            return ModelFiles(root, layout, spec, fix, artifacts)
    raise ConfigError(f"--model {model}: {root} has neither high_noise_model/ nor transformer/; name a Wan2.2 folder")


def _a14b_root(artifacts: Path) -> Path:
    """Returns the first folder that holds experts; if there is none, the original layout's in the artifacts folder."""
    own = [artifacts / folder for folder in (A14B_FOLDER, A14B_DIFFUSERS_FOLDER)]
    experts = [places.high_noise for places in _LAYOUTS.values()]
    found = (root for root in own if any((root / expert).is_dir() for expert in experts))
    return next(found, None) or next((root for layout in REPOS for root in cached(layout)), own[0])


def cached(layout: Layout) -> Iterator[Path]:
    """Yields the folders of the Hugging Face cache that hold all files of the published weights."""
    for root in snapshots(layout):
        with suppress(MissingArtifactError, CorruptArtifactError):
            ModelFiles(root, layout, A14B, "", root).require()
            yield root


def _shards(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those that its index names, or all if it has no index."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CorruptArtifactError(f"{index} has no weight_map: download this file again")
        return [folder / name for name in sorted(set(weight_map.values()))]
    return sorted(folder.glob("*.safetensors"))


def _read_spec(root: Path, layout: Layout) -> ModelSpec:
    """Reads all facts from wanfast.json, or only the networks' sizes from the layout's config files."""
    facts = root / _FACTS_FILE
    if facts.is_file():
        try:
            return ModelSpec.from_json(_read_json(facts))
        except TypeError as error:
            raise CorruptArtifactError(f"{facts}: {error}: fix this file, or copy it again") from None
    spec = dataclasses.replace(A14B, name=name_of(root))
    places = _LAYOUTS[layout]
    readers: tuple[tuple[str, str, Any], ...] = (
        ("dit", places.high_noise, _dit_spec),
        ("vae", places.vae, _vae_spec),
        ("umt5", places.umt5, _umt5_spec),
    )
    for part, folder, read in readers:
        config = root / folder / "config.json"
        if config.is_file():
            try:
                spec = dataclasses.replace(spec, **{part: read(_read_json(config))})
            except KeyError as error:
                raise CorruptArtifactError(f"{config}: the key {error} is missing: download this file again") from None
    index = root / "model_index.json"
    if index.is_file() and (boundary := _read_json(index).get("boundary_ratio")) is not None:
        spec = dataclasses.replace(spec, boundary=boundary)
    return spec


def _dit_spec(config: dict[str, Any]) -> DiTSpec:
    if "dim" in config:  # the original layout
        return DiTSpec(
            dim=config["dim"],
            ffn_dim=config["ffn_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_dim"],
            out_channels=config["out_dim"],
            num_heads=config["num_heads"],
            num_layers=config["num_layers"],
            text_dim=config.get("text_dim", A14B.dit.text_dim),
            text_len=config["text_len"],
            eps=config["eps"],
        )
    return DiTSpec(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        text_dim=config["text_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config["eps"],
    )


def _vae_spec(config: dict[str, Any]) -> VAESpec:
    return VAESpec(
        base_dim=config["base_dim"],
        latent_channels=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),  # spelled this way in the file
        latents_mean=tuple(config["latents_mean"]),
        latents_std=tuple(config["latents_std"]),
    )


def _umt5_spec(config: dict[str, Any]) -> UMT5Spec:
    return UMT5Spec(
        vocab_size=config["vocab_size"],
        dim=config["d_model"],
        attention_dim=config["num_heads"] * config["d_kv"],
        ffn_dim=config["d_ff"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
        eps=config["layer_norm_epsilon"],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not JSON ({error}): download this file again") from None
    if not isinstance(document, dict):
        raise CorruptArtifactError(f"{path} is not a JSON object: download this file again")
    return document
