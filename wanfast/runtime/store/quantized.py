"""Finds stored quantized experts by the key of their artifacts.

An artifact `quantized/<key>` holds one expert, quantized with one scheme. The key depends on the weights, the scheme
and the code that quantizes. The artifact's files are safetensors shards, the index of the shards, the quantization
error of every tensor (`errors.json`, `errors.png`), and the manifest. The tensors have the names of the original
layout.
This module does not import torch.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.config import ModelsConfig, default_artifacts_dir
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.choices import EXPERTS, Device, Expert, Scheme, in_8_bits
from wanfast.runtime.machine.packages import install, version_of
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.identity import is_old
from wanfast.runtime.store.loras import Lora, inputs_of, loras_of
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.shards import indexed_shards

KIND = "quantized"
LAYOUT_VERSION = 1
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)(.*)")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TORCHAO_FIX = install("quantize")

# Only the linears of each block are quantized: they have nearly all weights, and nearly all products with weights.
QUANTIZED = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
# Not quantized: the first and the last layer, the conditioning layers, and the small tensors.
KEPT = ("patch_embedding", "head", "text_embedding", "time_embedding", "time_projection", "modulation", "norms", "bias")
_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
# The code that reads the source, computes the values and writes the shards; `dit` states names and dtypes.
_CODE = (
    "runtime/jobs/quantize.py", "runtime/weights/checkpoint.py", "runtime/weights/key_maps.py",
    "runtime/weights/lora.py", "runtime/weights/forms.py", "runtime/weights/quantization.py",
    "runtime/store/expert_files.py", "runtime/models/quantized.py", "runtime/models/dit.py",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedExpert:
    """This class names one expert quantized with one scheme; its artifact may exist or be missing."""

    store: ArtifactStore
    files: ModelFiles  # what it is made from
    expert: Expert
    scheme: Scheme
    model: str  # as `--model` names it
    loras: tuple[Lora, ...] = ()  # of both experts; only those of this expert are merged into it

    def inputs(self, torchao: str | None, device: str | None) -> dict[str, Any]:
        """Returns everything that the artifact depends on; the artifact's key is the hash of the result.

        `torchao`: the version of torchao that quantizes, or None for the scheme bf16. `device`: the device that
        quantizes, "cuda" or "cpu". The scheme bf16 ignores `device`, because every device gives the same bf16 values.
        """
        loras = inputs_of(self.loras, self.expert)
        return {
            "source": self.files.fingerprint(self.expert),
            "facts": self.files.spec.dit.to_json(),
            "expert": self.expert,
            "recipe": self.scheme,  # the name in stored keys: another name would miss every stored artifact
            "quantized": list(QUANTIZED) if in_8_bits(self.scheme) else [],
            "kept": list(KEPT),
            "torchao": torchao,
            "torch": version_of("torch"),
            "device": device if in_8_bits(self.scheme) else None,
            "layout": LAYOUT_VERSION,
            "code": digest_of_code(*_CODE),
            **({"loras": loras} if loras else {}),
        }

    def find(self, *, verify: bool = False) -> Path | None:
        """Returns the artifact's folder, or None if the artifact is missing.

        For an 8-bit scheme, the artifact must be made with the installed torchao. If torchao is not installed, the
        artifact made with the newest torchao is taken. An artifact made on a GPU is preferred to one made on a CPU.
        `verify`: whether the hashes of the artifact's files are compared too. Raises CorruptArtifactError if the
        artifact is damaged.
        """
        installed = torchao_version() if in_8_bits(self.scheme) else None
        made_by = installed or max(self._versions(), default=None, key=_release)
        if made_by is None and in_8_bits(self.scheme):
            return None
        found = (
            self.store.find(KIND, self.inputs(made_by, device), verify=verify, again=f"run `{self.fix}`")
            for device in _DEVICES
        )
        return next(filter(None, found), None)

    def require(self, *, verify: bool = False) -> Path:
        """Returns the artifact's folder, or raises MissingArtifactError with the command that makes the artifact."""
        folder = self.find(verify=verify)
        if folder is None:
            others = ", ".join(sorted(self._versions(), key=_release))
            why = f" (only with torchao {others}, but {torchao_version()} is installed)" if others else ""
            if older := self._of_another_wanfast():
                why = f" (only by another version of wanfast or torch: {', '.join(older)}, which you may remove)"
            name = f"the {self.expert.replace('_', '-')} expert"
            raise MissingArtifactError(f"{name} is not quantized with {self.scheme} yet{why}: run `{self.fix}`")
        return folder

    @property
    def fix(self) -> str:
        root = [] if str(self.store.root) == default_artifacts_dir() else ["--artifacts-dir", str(self.store.root)]
        pairs = [*(named.words() for named in self.files.experts), *(lora.words() for lora in self.loras)]
        own = [word for pair in pairs for word in pair]
        return shlex.join(["wanfast", "quantize", "--model", self.model, "--scheme", self.scheme, *own, *root])

    def _versions(self) -> set[str]:
        """Returns the torchao versions of the artifacts that differ from this one only in them and in the device."""
        versions = {
            str(inputs.get("torchao"))
            for _, inputs in self.store.manifests(KIND)
            if inputs == self.inputs(inputs.get("torchao"), inputs.get("device"))
        }
        return {version for version in versions if _RELEASE.match(version)}

    def _of_another_wanfast(self) -> list[str]:
        """Returns the artifacts of this expert and scheme that other code or another torch made."""
        wanted = self.inputs(None, None)
        return [
            str(folder)
            for folder, inputs in self.store.manifests(KIND)
            if all(inputs.get(name) == wanted.get(name) for name in ("expert", "recipe", "loras"))
            and (inputs.get("source") == wanted["source"] or is_old(inputs.get("source")))
            and any(inputs.get(name) != wanted[name] for name in ("torch", "code"))
        ]


def _release(version: str) -> tuple[int, int, int, bool, str]:
    """Returns a key that sorts versions: 0.9.0, 0.18.0.dev1, 0.18.0. Raises ValueError for another text."""
    match = _RELEASE.match(version)
    if match is None:
        raise ValueError(version)
    major, minor, patch, suffix = match.groups()
    return int(major), int(minor), int(patch), not suffix, suffix


def quantized_expert(files: ModelFiles, models: ModelsConfig, expert: Expert) -> QuantizedExpert | None:
    """Returns the artifact that `--quantize` needs for an expert, or None without `--quantize`."""
    if models.quantize is None:
        return None
    store = ArtifactStore(Path(models.artifacts_dir))
    return QuantizedExpert(store, files, expert, models.quantize, models.model, loras_of(models))


def require_experts(
    files: ModelFiles, models: ModelsConfig, known: set[tuple[QuantizedExpert, bool]] | None = None
) -> None:
    """Raises WanFastError if a quantized expert that --quantize needs is missing; the error names the command to run.

    With --quantize-on-the-fly, no stored expert is needed, but torchao must be installed. `known`: a set in which this
    function remembers the artifacts that it found, as (artifact, whether its hashes were compared). If later calls
    get the same set, no artifact is checked twice.
    """
    if models.quantize_on_the_fly:
        require_torchao("--quantize-on-the-fly")
        return
    known = set() if known is None else known
    for name in EXPERTS:
        expert = quantized_expert(files, models, name)
        if expert and (expert, models.verify) not in known:
            expert.require(verify=models.verify)
            known.add((expert, models.verify))


def shards(folder: Path) -> list[Path]:
    """Returns the safetensors shards in the folder of a quantized expert's artifact."""
    return indexed_shards(folder / INDEX)


def torchao_version() -> str | None:
    """Returns the installed version of torchao without importing it, or None if torchao is not installed."""
    return version_of("torchao")


def require_torchao(option: str) -> str:
    """Returns the installed version of torchao.

    Raises ConfigError if torchao is not installed. The error says that `option`, such as "--quantize-on-the-fly", needs
    torchao.
    """
    found = torchao_version()
    if found is None:
        raise ConfigError(f"{option} needs torchao: run `{TORCHAO_FIX}`")
    return found
