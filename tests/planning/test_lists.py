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

from tests.conftest import Machine, Outcome
from wanfast.runtime.planning import image_inputs, notes, skips
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

    monkeypatch.setattr(notes, "PromptTokenizer", counted("tokenizer", notes.PromptTokenizer))
    monkeypatch.setattr(image_inputs.images, "load_image", counted("image", image_inputs.images.load_image))
    monkeypatch.setattr(model_files, "read_spec", counted("model", model_files.read_spec))
    monkeypatch.setattr(pynvml, "nvmlInit", counted("driver", pynvml.nvmlInit))
    write_list(20)
    outcome = wanfast("generate", "--model", str(small_model), *VIDEO)
    assert outcome.exit_code == 0, outcome.err
    assert asked["driver"] <= 1
    assert {name: asked[name] for name in ("tokenizer", "image", "model")} == {"tokenizer": 1, "image": 1, "model": 1}


def test_the_skips_of_a_list_are_chosen_once(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for skips of both branches together, and once for separate skips, whose number the plan shows."""
    asked: list[bool] = []
    plan_best = skips.plan_best

    def counted(*args: Any, joint: bool, **named: Any) -> Any:
        asked.append(joint)
        return plan_best(*args, joint=joint, **named)

    skips._chosen.cache_clear()
    monkeypatch.setattr(skips, "plan_best", counted)
    write_list(4)
    budget = ("--steps", "7", "--magcache", "preset", "--magcache-interpolate", "--magcache-budget", "0.83")
    outcome = wanfast("generate", "--model", "tiny", *VIDEO, *budget)
    assert outcome.exit_code == 0, outcome.err
    assert sorted(asked) == [False, True]


def test_a_note_of_many_lines_is_printed_once(wanfast: Wanfast) -> None:
    write_list(20)
    notes = [line for line in wanfast("generate", "--model", "tiny", *VIDEO).err.splitlines() if "note" in line]
    assert notes and all(line.startswith("note (line 1 and 19 others): ") for line in notes)


def test_a_note_of_two_lines_names_both(wanfast: Wanfast) -> None:
    write_list(2)
    assert "note (lines 1 and 2): " in wanfast("generate", "--model", "tiny", *VIDEO).err


def test_a_file_that_is_no_list_is_one_line(wanfast: Wanfast) -> None:
    Path("jobs.jsonl").write_text(json.dumps({"plan": {}, "seeds": [1, 2, 3]}, indent=2))
    outcome = wanfast("generate", "--model", "tiny", *VIDEO)
    assert outcome.exit_code == 2 and len(outcome.err.splitlines()) == 1
    assert "none of its 8 lines is a JSON object of options (line 1: not JSON: " in outcome.err
    assert "give a file with one JSON object on each line" in outcome.err


def test_a_list_with_bad_lines_says_how_many_succeeded(wanfast: Wanfast) -> None:
    Path("jobs.jsonl").write_text("{}\n" + "{'steps': 4}\n" * 6)
    outcome = wanfast("generate", "--model", "tiny", *VIDEO)
    assert outcome.exit_code == 6 and outcome.document["failed"] == 6
    name = "Expecting property name enclosed in double quotes"
    assert f"error (line 2): not JSON: {name} at column 2\n" in outcome.err
    assert outcome.err.endswith("--jobs: 1 succeeded, 6 of 7 failed: fix the lines whose errors are printed above\n")


def test_existing_videos_are_left_out(wanfast: Wanfast, workdir: Path) -> None:
    write_list(3)
    (workdir / "out-0001.mp4").touch()
    refused = f"note (line 1): a run would be refused, because {workdir / 'out-0001.mp4'} exists: add --overwrite"
    planned = wanfast("generate", "--model", "tiny", *VIDEO)
    assert planned.exit_code == 0 and refused in planned.err
    assert "a run would" not in wanfast("generate", "--model", "tiny", *VIDEO, "--overwrite").err
    (workdir / "out-0001.json").touch()
    outcome = wanfast("generate", "--model", "tiny", *VIDEO, "--skip-existing")
    first, *others = outcome.document["results"]
    assert outcome.exit_code == 0 and first == {
        "line": 1,
        "output": str(workdir / "out-0001.mp4"),
        "skipped": "the video exists",
    }
    assert [result["plan"]["seed"] for result in others] == [1, 2]
    contact = wanfast("generate", "--model", "tiny", *VIDEO, "--skip-existing", "--contact-sheet")
    assert contact.exit_code == 0 and refused in contact.err  # the sheet is missing
    both = wanfast("generate", "--model", "tiny", *VIDEO, "--skip-existing", "--overwrite")
    assert both.exit_code == 6 and "--overwrite and --skip-existing exclude each other" in both.err


def test_no_line_overwrites_what_another_is_made_from(wanfast: Wanfast, workdir: Path) -> None:
    """The contact sheet of line 1 has the name of the image of line 2."""
    shutil.copy("cat.png", "b.png")
    lines = [{"output": "b.mp4", "contact_sheet": True}, {"image": "b.png", "output": "c.mp4"}]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = wanfast("generate", "--model", "tiny", *VIDEO, "--overwrite")
    first, second = outcome.document["results"]
    assert outcome.exit_code == 6 and "b.png would overwrite a file that a video is made from" in first["error"]
    assert "error" not in second


def test_the_images_of_a_list_lie_beside_it(wanfast: Wanfast, workdir: Path) -> None:
    (workdir / "sets/a").mkdir(parents=True)
    shutil.copy("cat.png", "sets/a/dog.png")
    Path("sets/jobs.jsonl").write_text('{"image": "a/dog.png"}\n{}\n{"image": "cat.png"}\n')
    options = ("generate", "--model", "tiny", *VIDEO[:6], "--jobs", "sets/jobs.jsonl", "--dry-run", "--json")
    beside, typed, wrong = wanfast(*options).document["results"]
    assert "plan" in beside and "plan" in typed and "sets/cat.png: no such file" in wrong["error"]


def test_a_line_may_name_a_model_of_its_own_on_several_ranks(
    wanfast: Wanfast, small_model: Path, machine: Machine
) -> None:
    """The mesh fits the heads of every model: the tiny one has two, the small one eight."""
    machine(0, 0)
    Path("jobs.jsonl").write_text(json.dumps({"model": str(small_model)}) + "\n{}\n")
    outcome = wanfast("generate", "--model", "tiny", *VIDEO, "--num-gpus", "4", "--cfg-parallel", "1")
    assert outcome.exit_code == 0, outcome.err
    plans = [result["plan"] for result in outcome.document["results"]]
    assert [plan["model"] for plan in plans] == ["small", "tiny"]
    assert [plan["mesh"] for plan in plans] == [{"replica": 2, "cfg": 1, "ulysses": 2}] * 2


def test_null_leaves_an_option_as_it_is_and_no_key_stands_twice(wanfast: Wanfast, workdir: Path) -> None:
    Path("jobs.jsonl").write_text('{"seed": null, "image": null, "prompt": null}\n{"seed": 1, "seed": 2}\n')
    null, twice = wanfast("generate", "--model", "tiny", *VIDEO, "--seed", "7").document["results"]
    assert null["plan"]["seed"] == 7 and null["effective"]["video"]["prompt"] == "A cat."
    assert twice["error"] == "'seed' is given twice in the line: keep one"


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
