"""Prompt -> text embeddings, remembered as artifacts: where all texts are known, the 11 GB encoder is never loaded.

A text is encoded at its true length; its embeddings depend on nothing else, so they are the same in any video.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.runtime.artifacts import ArtifactStore
from wanfast.runtime.builders import build_umt5
from wanfast.runtime.config import Precision
from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.metadata import versions
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.tokenizer import PromptTokenizer, TokenizedPrompt

KIND = "prompt_embeds"


def prompt_embeds(
    texts: Iterable[str], files: ModelFiles, store: ArtifactStore, precision: Precision, device: str
) -> dict[str, Tensor]:
    """{text: [n, text_dim]} on the CPU, n the text's tokens; UMT5 is loaded once if any text is new, then dropped."""
    tokenizer = PromptTokenizer(files.tokenizer, files.spec.dit.text_len)
    tokens = {text: tokenizer.encode(text) for text in texts}
    inputs = {text: _inputs(tokens[text], files, precision, device) for text in tokens}
    if unknown := [text for text in tokens if store.find(KIND, inputs[text]) is None]:
        _encode({text: tokens[text] for text in unknown}, inputs, files, store, precision, device)
    return {text: _load(store, inputs[text]) for text in tokens}


@torch.inference_mode()
def _encode(
    tokens: dict[str, TokenizedPrompt],
    inputs: dict[str, dict[str, Any]],
    files: ModelFiles,
    store: ArtifactStore,
    precision: Precision,
    device: str,
) -> None:
    umt5 = build_umt5(files, precision, device)
    for text, prompt in tokens.items():
        embeds = umt5(torch.tensor([prompt.ids], device=device))[0].cpu().contiguous()

        def write(folder: Path, embeds: Tensor = embeds) -> None:
            save_file({"embeds": embeds}, folder / "embeds.safetensors")

        store.publish(KIND, inputs[text], write, versions())
    del umt5
    if device == "cuda":
        torch.cuda.empty_cache()  # 11 GB in pieces of UMT5's sizes, which the experts would not fit into


def _load(store: ArtifactStore, inputs: dict[str, Any]) -> Tensor:
    folder = store.find(KIND, inputs)
    if folder is None:
        raise CorruptArtifactError(f"{store.path(KIND, inputs)} was removed while this run began: start again")
    return load_file(folder / "embeds.safetensors")["embeds"]


def _inputs(tokens: TokenizedPrompt, files: ModelFiles, precision: Precision, device: str) -> dict[str, Any]:
    return {
        "umt5": files.fingerprints["umt5"],
        "tokenizer": files.fingerprints["tokenizer"],
        "text": tokens.text,
        "text_len": files.spec.dit.text_len,
        "precision": precision,
        "device": device,
        "torch": versions()["torch"],
    }
