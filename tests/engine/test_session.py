"""Tests what a session does once for many videos: compiler caches, text embeddings and source images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import compilation
from wanfast.runtime.engine import session as session_module
from wanfast.runtime.engine.session import Sessions
from wanfast.runtime.jobs import generate
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.plan import Job, resolve

SHAPE: dict[str, Any] = {
    "model": "tiny", "device": "cpu", "image": "cat.png", "prompt": "a cat", "seed": 1, "steps": 2, "size": "64x64",
    "frames": 5,
}  # fmt: skip


def job_of(**options: Any) -> Job:
    (plan,) = place([resolve({**SHAPE, **options}, writes=False)[0]])
    return plan.job()


def make(jobs: Iterable[Job], sessions: Sessions) -> list[dict[str, Any]]:
    found = generate.run(list(jobs), sessions, frames_of=lambda index: Path(f"frames/{index}.npy"))
    return [result for _, result in found]


@pytest.mark.parametrize("found", ["0123456789ab", None])
def test_compiler_caches_are_loaded_once_for_each_key(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """A miss is not repeated either, because the first video compiles the blocks."""
    looked: list[int] = []

    def load(store: object, inputs: dict[str, Any], *arguments: object, **named: object) -> str | None:
        looked.append(inputs["tokens"])
        return found

    monkeypatch.setattr(session_module, "load_caches", load)
    monkeypatch.setattr(compilation, "_import_compiler", lambda gpu: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: None)
    small, large = job_of(compile=True), job_of(compile=True, size="96x64")
    sessions = Sessions(Ranks("cpu"))
    results = make([small, large, small, small], sessions)
    assert [result["compile_cache"] for result in results] == [found] * 4
    of_small, of_large = (result["plan"]["tokens"] for result in results[:2])
    assert looked == [of_small, of_large]
    sessions.close()
    make([small], sessions)
    assert looked == [of_small, of_large, of_small]  # a new session
