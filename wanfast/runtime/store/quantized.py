"""Where quantized experts are kept and what their key says: source, scheme, what was quantized, torchao. Torch-free.

An artifact `quantized/<key>` is one expert by one scheme: safetensors in shards with an index, under the original
layout's names, the error of every tensor (`errors.json`, `errors.png`) and the manifest.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from wanfast.runtime.config import ModelsConfig
from wanfast.runtime.errors import ConfigError, MissingArtifactError
from wanfast.runtime.facts.choices import Expert, Scheme, in_8_bits
from wanfast.runtime.machine.packages import version_of
from wanfast.runtime.store.artifacts import MANIFEST, ArtifactStore
from wanfast.runtime.store.model_files import ModelFiles

KIND = "quantized"
LAYOUT_VERSION = 1
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TORCHAO_FIX = "pip install 'torchao>=0.18,<0.19'"
EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")

# The linears of each block, where nearly all weights and all of the work are; nothing else is quantized.
QUANTIZED = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
# The first and the last layer, all that conditions, and all that is small.
KEPT = ("patch_embedding", "head", "text_embedding", "time_embedding", "time_projection", "modulation", "norms", "bias")


@dataclass(frozen=True)
class QuantizedExpert:
    """One expert by one scheme, whether it is there or not."""

    store: ArtifactStore
    files: ModelFiles  # what it is made from
    expert: Expert
    scheme: Scheme
    model: str  # as `--model` names it

    def inputs(self, torchao: str | None) -> dict[str, Any]:
        return {
            "source": self.files.fingerprint(self.expert),
            "expert": self.expert,
            "recipe": self.scheme,  # the word of the first keys: another would make every kept artifact a miss
            "quantized": list(QUANTIZED) if in_8_bits(self.scheme) else [],
            "kept": list(KEPT),
            "torchao": torchao,
            "layout": LAYOUT_VERSION,
        }

    def find(self, *, verify: bool = False) -> Path | None:
        """The artifact's folder, or None. Without torchao here, one made by any version of it does.

        Raises CorruptArtifactError.
        """
        here = torchao_version() if in_8_bits(self.scheme) else None
        made_by = here or max(self._versions(), default=None, key=Version)
        if made_by is None and in_8_bits(self.scheme):
            return None
        return self.store.find(KIND, self.inputs(made_by), verify=verify)

    def require(self, *, verify: bool = False) -> Path:
        """The same, which must be there. Raises MissingArtifactError with the command that makes it."""
        folder = self.find(verify=verify)
        if folder is None:
            others = ", ".join(sorted(self._versions(), key=Version))
            by_other = f" (there is one by torchao {others}, and here is {torchao_version()})" if others else ""
            raise MissingArtifactError(
                f"{self.expert} is not quantized by {self.scheme} yet{by_other}: run `{self.fix}`"
            )
        return folder

    @property
    def fix(self) -> str:
        root = (
            []
            if str(self.store.root) == str(Path("artifacts").absolute())
            else ["--artifacts-dir", str(self.store.root)]
        )
        return shlex.join(["wanfast", "quantize", "--model", self.model, "--scheme", self.scheme, *root])

    def _versions(self) -> set[str]:
        """torchao's, of artifacts that differ in nothing else."""
        found = set()
        for manifest in (self.store.root / KIND).glob(f"*/{MANIFEST}"):
            try:
                inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
                Version(inputs["torchao"])  # or it cannot be compared
            except (ValueError, KeyError, TypeError):
                continue  # not ours to judge: `find` judges what it opens
            if inputs == self.inputs(inputs["torchao"]):
                found.add(inputs["torchao"])
        return found


def quantized_expert(files: ModelFiles, models: ModelsConfig, expert: Expert) -> QuantizedExpert | None:
    """What `--quantize` asks for of an expert, or None."""
    if models.quantize is None:
        return None
    return QuantizedExpert(ArtifactStore(Path(models.artifacts_dir)), files, expert, models.quantize, models.model)


def require_experts(
    files: ModelFiles, models: ModelsConfig, known: set[tuple[QuantizedExpert, bool]] | None = None
) -> None:
    """What --quantize asks for is there, or torchao, where it is to be made. Raises WanFastError with the command.

    `known`: what was found already, to which this adds: hashes take a while.
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
    """The weight files of an artifact."""
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(weight_map.values()))]


def torchao_version() -> str | None:
    """What is installed here, without importing it."""
    return version_of("torchao")


def require_torchao(option: str) -> str:
    """Raises ConfigError if it is not installed."""
    found = torchao_version()
    if found is None:
        raise ConfigError(f"{option} needs torchao: {TORCHAO_FIX}")
    return found
