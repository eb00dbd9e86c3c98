"""Encodes prompts and stores the embeddings as artifacts, so that a stored prompt does not need the 11 GB encoder.

A text is encoded without padding. Its embedding depends on no other text and on no option of the video, so every video
with this text can use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.device.hardware import describe, free_memory
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import ConfigError, CorruptArtifactError, foreign
from wanfast.runtime.machine.packages import versions
from wanfast.runtime.media.tokenizer import PromptTokenizer, TokenizedPrompt
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.store.artifacts import ArtifactStore, note
from wanfast.runtime.store.code import digest_of_code
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.weights.builders import build_umt5

KIND = "prompt_embeds"
_FILE = "embeds.safetensors"
_AT_ONCE = 32  # texts whose new embeddings are in memory before they are stored
_CODE = (
    "runtime/models/umt5.py", "runtime/media/tokenizer.py", "runtime/weights/builders.py",
    "runtime/weights/checkpoint.py", "runtime/weights/key_maps.py", "runtime/device/hardware.py",
    "runtime/engine/prompt_embeds.py",
)  # fmt: skip


class Encoded(NamedTuple):
    """This class holds embeddings; it also names texts whose embeddings are not stored or are not finite."""

    embeds: dict[str, Tensor]  # {text: embedding [n, text_dim]} on the CPU; n is the text's number of tokens
    unstored: set[str]  # those texts of `embeds` that are not stored
    not_finite: list[str]  # the texts whose embeddings hold NaN or an infinity; these are neither returned nor stored


def prompt_embeds(
    texts: Iterable[str],
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
    before_load: Callable[[], None] = lambda: None,
    most: int | None = None,
    *,
    stores: bool = True,
) -> Encoded:
    """Returns the embeddings of `texts` on every rank; first encodes the texts whose embeddings are not stored yet.

    New embeddings are stored if `stores` is true. If `most` is given, returns the embeddings of the first `most` texts,
    and of later texts only those embeddings that are not stored.
    The texts to encode are divided among the ranks. A rank with such texts calls `before_load`, loads UMT5, encodes its
    texts, and frees UMT5. The seconds of loading are added to `loads`. With `--t5-fsdp on`, the ranks share one sharded
    UMT5, and encode every text together.
    """
    store = ArtifactStore(Path(config.models.artifacts_dir))
    tokenizer = ranks.together(lambda: PromptTokenizer(files.tokenizer, files.spec.dit.text_len))
    tokens = {text: tokenizer.encode(text) for text in texts}
    ranks.together(lambda: _check_ids(tokens.values(), files))
    inputs = {text: _inputs(tokens[text], files, config) for text in tokens}
    first = set(list(tokens)[:most])
    stored, embeds = ranks.lead(lambda: _stored(store, inputs, first))
    unstored: set[str] = set()
    not_finite: list[str] = []
    errors: list[ConfigError] = []  # on the leader
    unknown = {text: tokens[text] for text in tokens if not stored.get(text)}
    for encoded in _encoded(unknown, files, config, ranks, loads, before_load):
        finite = {text: tensor for text, tensor in encoded.items() if all_finite(tensor)}
        not_finite += [text for text in encoded if text not in finite]
        lost = ranks.lead(partial(_publish, store, finite, inputs, stored, errors)) if stores else {*finite}
        unstored |= lost
        embeds |= {text: tensor for text, tensor in finite.items() if text in first or text in lost}
    if errors:
        note(f"{errors[0]}: {len(errors)} of {len(unknown)} texts are not stored; a later video encodes them again")
    return Encoded(embeds, unstored, not_finite)


def _encoded(
    tokens: dict[str, TokenizedPrompt],
    files: ModelFiles,
    config: EffectiveConfig,
    ranks: Ranks,
    loads: Stopwatch,
    before_load: Callable[[], None],
) -> Iterator[dict[str, Tensor]]:
    """Yields on all ranks the embeddings of the next few texts."""
    sharded = config.ranks.t5_fsdp == "on"

    @functools.cache
    def umt5() -> UMT5Encoder:
        before_load()
        with loads.span("umt5"):
            group = ranks if sharded else Ranks(ranks.device)
            return build_umt5(files, config.models.precision, group, sharded=sharded)

    texts = list(tokens)
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        if sharded:
            yield _encode({text: tokens[text] for text in part}, umt5, ranks.device)
        else:
            own = {text: tokens[text] for text in part[ranks.rank :: ranks.size]}
            parts = ranks.gather(ranks.together(partial(_encode, own, umt5, ranks.device)))
            yield {text: embeds for each in parts for text, embeds in each.items()}
    if umt5.cache_info().currsize:
        umt5.cache_clear()
        free_memory(ranks.device)  # 11 GB in blocks of UMT5's sizes, which the experts cannot reuse


@torch.inference_mode()
def _encode(tokens: dict[str, TokenizedPrompt], umt5: Callable[[], UMT5Encoder], device: str) -> dict[str, Tensor]:
    """Returns the embeddings of texts. `umt5` loads UMT5 at its first call, so it is called only for a text."""
    return {
        text: umt5()(torch.tensor([prompt.ids], device=device))[0].cpu().contiguous() for text, prompt in tokens.items()
    }


def _publish(
    store: ArtifactStore,
    encoded: dict[str, Tensor],
    inputs: dict[str, dict[str, Any]],
    stored: dict[str, bool],
    errors: list[ConfigError],
) -> set[str]:
    """Stores embeddings; returns the texts that could not be stored, and adds their errors to `errors`."""
    failed = set()
    for text, embeds in encoded.items():
        try:
            if text in stored:  # not finite; the store does not replace what fits its manifest
                store.discard(KIND, inputs[text])
            store.publish(KIND, inputs[text], partial(_save, embeds), versions(), damaged="miss")
        except ConfigError as error:  # an artifact that only saves time later
            failed.add(text)
            errors.append(error)
    return failed


def _check_ids(tokens: Iterable[TokenizedPrompt], files: ModelFiles) -> None:
    """Raises CorruptArtifactError if UMT5 lacks an id."""
    most, size = max(max(each.ids) for each in tokens), files.spec.umt5.vocab_size
    if most >= size:
        raise CorruptArtifactError(
            f"{files.tokenizer} gives the token id {most}, but UMT5 has only {size} ids: "
            "copy the tokenizer and UMT5 from the same model"
        )


def _save(embeds: Tensor, folder: Path) -> None:
    save_file({"embeds": embeds}, folder / _FILE)


def _stored(
    store: ArtifactStore, inputs: dict[str, dict[str, Any]], first: set[str]
) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Returns {stored text: whether its embedding is finite}, and the finite embeddings of the `first` texts.

    A damaged artifact is a cache miss, because a text takes seconds.
    """
    is_finite, embeds = {}, {}
    for text in inputs:
        folder = store.find(KIND, inputs[text], verify=True, damaged="miss")
        if folder is None:
            continue
        found = _load(folder)
        is_finite[text] = bool(all_finite(found))
        if is_finite[text] and text in first:
            embeds[text] = found
    return is_finite, embeds


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
