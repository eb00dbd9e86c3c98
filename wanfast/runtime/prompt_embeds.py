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
from wanfast.runtime.metadata import versions
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.tokenizer import PromptTokenizer, TokenizedPrompt

KIND = "prompt_embeds"


@torch.inference_mode()
def prompt_embeds(
    texts: Iterable[str], files: ModelFiles, store: ArtifactStore, precision: Precision, device: str
) -> dict[str, Tensor]:
    """{text: [n, text_dim]} on `device`, n the text's tokens; UMT5 is loaded once if any text is new, then dropped."""
    tokenizer = PromptTokenizer(files.tokenizer, files.spec.dit.text_len)
    tokens = {text: tokenizer.encode(text) for text in dict.fromkeys(texts)}
    inputs = {text: _inputs(tokens[text], files, precision, device) for text in tokens}
    folders = {text: store.find(KIND, inputs[text]) for text in tokens}
    if None in folders.values():
        umt5 = build_umt5(files, precision, device)
        for text in (text for text, folder in folders.items() if folder is None):
            ids = torch.tensor([tokens[text].ids], device=device)
            embeds = umt5(ids)[0].cpu().contiguous()

            def write(folder: Path, embeds: Tensor = embeds) -> None:
                save_file({"embeds": embeds}, folder / "embeds.safetensors")

            folders[text] = store.publish(KIND, inputs[text], write, versions())
    return {
        text: load_file(folder / "embeds.safetensors")["embeds"].to(device)
        for text, folder in folders.items()
        if folder
    }


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
