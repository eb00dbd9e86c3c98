"""Encodes prompts and stores the embeddings as artifacts, so that a stored prompt does not need the 11 GB encoder.

A text is encoded without padding. Its embedding depends on no other text and on no option of the video, so every video
with this text can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.device.hardware import describe, free_memory
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.finite import require_finite
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.facts.choices import Precision
from wanfast.runtime.machine.packages import versions
from wanfast.runtime.media.tokenizer import PromptTokenizer, TokenizedPrompt
from wanfast.runtime.store.artifacts import ArtifactStore, note
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.builders import build_umt5

KIND = "prompt_embeds"
_FILE = "embeds.safetensors"
_CODE = (
    "runtime/models/umt5.py", "runtime/media/tokenizer.py", "runtime/weights/builders.py",
    "runtime/weights/checkpoint.py", "runtime/weights/key_maps.py", "runtime/device/hardware.py",
    "runtime/engine/prompt_embeds.py",
)  # fmt: skip


def prompt_embeds(
    texts: Iterable[str],
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
    before_load: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Returns {text: embedding [n, text_dim]} on the CPU of every rank; n is the text's number of tokens.

    Texts whose embeddings are not stored are distributed over the ranks, encoded and stored. A rank that must encode
    texts calls `before_load`, loads UMT5, adds the seconds of loading to `loads`, and frees UMT5 afterwards. With
    `--t5-fsdp on`, each rank holds a share of UMT5, and all ranks encode all texts together.
    """
    store = ArtifactStore(Path(config.models.artifacts_dir))
    tokenizer = ranks.together(lambda: PromptTokenizer(files.tokenizer, files.spec.dit.text_len))
    tokens = {text: tokenizer.encode(text) for text in texts}
    ranks.together(lambda: _check_ids(tokens.values(), files))
    inputs = {text: _inputs(tokens[text], files, config) for text in tokens}
    stored = ranks.lead(lambda: _stored(store, inputs))
    known = {text: embeds for text, embeds in stored.items() if all_finite(embeds)}
    unknown = {text: tokens[text] for text in tokens if text not in known}
    if not unknown:
        return known
    if config.ranks.t5_fsdp == "on":
        encoded = _encode(unknown, files, config.models.precision, ranks, loads, before_load, sharded=True)
    else:
        own = dict(list(unknown.items())[ranks.rank :: ranks.size])
        parts = ranks.gather(
            ranks.together(
                lambda: _encode(own, files, config.models.precision, Ranks(ranks.device), loads, before_load)
            )
        )
        encoded = {text: embeds for part in parts for text, embeds in part.items()}

    for text, embeds in encoded.items():
        _check(text, embeds, ranks)

    def publish() -> None:
        errors = []
        for text, embeds in encoded.items():
            try:
                if text in stored:  # not finite; the store does not replace what fits its manifest
                    store.discard(KIND, inputs[text])
                store.publish(KIND, inputs[text], partial(_save, embeds), versions(), damaged="miss")
            except ConfigError as error:  # an artifact that only saves time later
                errors.append(error)
        if errors:
            note(f"{errors[0]}: {len(errors)} of {len(encoded)} texts are not stored; a later video encodes them again")

    ranks.lead(publish)
    return known | encoded


@torch.inference_mode()
def _encode(
    tokens: dict[str, TokenizedPrompt],
    files: ModelFiles,
    precision: Precision,
    ranks: Ranks,
    loads: Stopwatch,
    before_load: Callable[[], None],
    *,
    sharded: bool = False,
) -> dict[str, Tensor]:
    if not tokens:
        return {}
    before_load()
    with loads.span("umt5"):
        umt5 = build_umt5(files, precision, ranks, sharded=sharded)
    device = ranks.device
    encoded = {
        text: umt5(torch.tensor([prompt.ids], device=device))[0].cpu().contiguous() for text, prompt in tokens.items()
    }
    del umt5
    free_memory(device)  # 11 GB in blocks of UMT5's sizes, which the experts cannot reuse
    return encoded


def _check_ids(tokens: Iterable[TokenizedPrompt], files: ModelFiles) -> None:
    """Raises CorruptArtifactError if UMT5 lacks an id."""
    most, size = max(max(each.ids) for each in tokens), files.spec.umt5.vocab_size
    if most >= size:
        raise CorruptArtifactError(
            f"{files.tokenizer} gives the token id {most}, but UMT5 has only {size} ids: "
            "copy the tokenizer and UMT5 from the same model"
        )


def _check(text: str, embeds: Tensor, ranks: Ranks) -> None:
    """Raises NotFiniteError on all ranks if an embedding is not finite; every rank holds the same."""
    if not all_finite(embeds):
        ranks.together(lambda: require_finite(f"UMT5's embedding of the text {text!r:.60}", finite=False))


def _save(embeds: Tensor, folder: Path) -> None:
    save_file({"embeds": embeds}, folder / _FILE)


def _stored(store: ArtifactStore, inputs: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Returns the embeddings of the stored texts. A damaged artifact is a cache miss, because a text takes seconds."""
    folders = {text: store.find(KIND, inputs[text], verify=True, damaged="miss") for text in inputs}
    return {text: _load(folder) for text, folder in folders.items() if folder is not None}


def _load(folder: Path) -> Tensor:
    with foreign(
        str(folder / _FILE), "remove the folder of this file, and run this command again", CorruptArtifactError
    ):
        return load_file(folder / _FILE)["embeds"]


def _inputs(tokens: TokenizedPrompt, files: ModelFiles, config: EffectiveConfig) -> dict[str, Any]:
    """Returns everything that an embedding depends on; the ids hold all that the tokenizer decides."""
    return {
        "umt5": files.fingerprint("umt5"),
        "facts": files.spec.umt5.to_json(),
        "text": tokens.text,
        "ids": list(tokens.ids),
        "precision": config.models.precision,
        "tf32": bool(config.models.tf32),
        "device": describe(config.ranks.device)["device"],
        "torch": versions()["torch"],
        "code": digest_of_code(*_CODE),
    }
