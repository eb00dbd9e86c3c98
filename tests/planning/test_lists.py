"""Plans whole lists."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.conftest import Outcome
from wanfast.runtime.planning import plan
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import TINY

Wanfast = Callable[..., Outcome]
VIDEO = ("--device", "cpu", "--image", "cat.png", "--prompt", "A cat.", "--jobs", "jobs.jsonl", "--dry-run", "--json")


def write_list(lines: int) -> None:
    Path("jobs.jsonl").write_text("".join(json.dumps({"seed": seed}) + "\n" for seed in range(lines)))


def test_a_list_asks_each_question_once(wanfast: Wanfast, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lines must not read the tokenizer, the image, the model's facts and the driver's list each."""
    asked: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **named: Any) -> Any:
            asked[name] += 1
            return function(*args, **named)

        return count

    monkeypatch.setattr(plan, "PromptTokenizer", counted("tokenizer", plan.PromptTokenizer))
    monkeypatch.setattr(plan.media_io, "load_image", counted("image", plan.media_io.load_image))
    monkeypatch.setattr(model_files, "_read_spec", counted("model", model_files._read_spec))
    monkeypatch.setattr(pynvml, "nvmlInit", counted("driver", pynvml.nvmlInit))
    write_list(20)
    outcome = wanfast("generate", "--model", str(small_model), *VIDEO)
    assert outcome.exit_code == 0, outcome.err
    assert asked["driver"] <= 1
    assert {name: asked[name] for name in ("tokenizer", "image", "model")} == {"tokenizer": 1, "image": 1, "model": 1}


def test_a_note_of_many_lines_is_printed_once(wanfast: Wanfast) -> None:
    write_list(20)
    notes = [line for line in wanfast("generate", "--model", "tiny", *VIDEO).err.splitlines() if "note" in line]
    assert notes and all(line.startswith("note (line 1 and 19 others): ") for line in notes)


@pytest.mark.long
def test_a_thousand_lines_are_planned_in_20_s(wanfast: Wanfast, small_model: Path, workdir: Path) -> None:
    """The model's tokenizer has 256,000 pieces, as the published one has."""
    folder = workdir / "model"
    shutil.copytree(small_model, folder)
    file = folder / "tokenizer/tokenizer.json"
    document = json.loads((TINY / "tokenizer/tokenizer.json").read_text())
    pieces = document["model"]["vocab"]
    pieces |= {f"▁piece{number}": number for number in range(len(pieces), 256_000)}
    file.write_text(json.dumps(document))
    write_list(1000)
    started = time.monotonic()
    outcome = wanfast("generate", "--model", str(folder), *VIDEO)
    seconds = time.monotonic() - started
    print(f"1000 lines: {seconds:.1f} s")
    assert outcome.exit_code == 0 and len(outcome.document["results"]) == 1000
    assert seconds < 20
