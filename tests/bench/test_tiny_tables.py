"""Tests that what was judged on the tiny model belongs to the weights that ship, and that the pages show it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.bench.results import ROOT, program
from tests.bench.test_kinds_table import measured_kinds
from tests.house.test_makefile import make
from wanfast.cli import app

tables = program("tiny_tables")
words = program("tiny_pages")
GPU = "tiny-quality-256"


def test_all_tables_are_of_the_weights_that_ship() -> None:
    known, present = tables.made(ROOT), tables.weights()
    assert tables.stale(known, present) == [], "run `make tiny-tables`"
    for name, row in known.items():
        assert row["weights"] == tables.judged_by(name, present), f"{name}: run `make tiny-tables`"
        assert all((ROOT / file).exists() for file in tables.TABLES[name].files), name
        for file in (ROOT / file for file in tables.TABLES[name].files if f"{tables.RESULTS}/" in file):
            if file.suffix == ".json" and (parts := json.loads(file.read_text()).get("weights")):
                assert tables.identity(parts) == present, f"{file.name}: run `make {name}`"


def test_the_pages_are_those_of_the_results() -> None:
    for page, text in tables.pages(ROOT).items():
        assert text == (ROOT / page).read_text(), f"{page}: run `python benchmarks/tiny_tables.py --pages`"


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_made_by_the_target_of_its_name(name: str) -> None:
    printed = make(Path("BIN"), "-n", name)
    file = Path(tables.TABLES[name].files[0])
    assert (file.name if name != "tiny-preset" else "benchmarks/tiny_preset.py") in printed
    if name.removeprefix("tiny-quality-") in words.SCHEMES:
        assert f"--quantize {name.removeprefix('tiny-quality-')} --output" in printed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Copies the pages and all that they show into an empty folder."""
    for page in tables.pages(ROOT):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / tables.RESULTS, tmp_path / tables.RESULTS, ignore=shutil.ignore_patterns("tiny-training"))
    for file in ("training/photographs.json", "wanfast/assets/tiny/wanfast.json", f"{words.EXAMPLES}/jobs.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_photographs_and_larger_videos_get_columns(root: Path) -> None:
    file = root / tables.RESULTS / "tiny-quality.json"
    row = {"right": 93, "of": 100, "95%": [0.863, 0.966]}
    camera = {
        **dict.fromkeys(("vae_psnr", "first_frame_psnr", "psnr", "flicker", "motion", "true_flicker"), 31.25),
        **dict.fromkeys(("true_motion", "ssim", "ms_ssim", "chance"), 0.875),
        "prompt_following": row,
        "empty_prompt": {"right": 3, "of": 25},
        "last_frame_psnr": 27.06,
        "last_frame_reached": {"right": 24, "of": 25},
    }
    change(file, camera=camera, vae_psnr=38.75, ssim=0.9761, ms_ssim=0.9766)
    larger = file.with_name("tiny-quality-256.json")
    shutil.copy(file, larger)
    change(larger, vae_psnr=44.44, versions={"torch": "2.11.0+cu130"}, commit="0123456789ab-dirty")
    text = tables.pages(root)["docs/quality.md"]
    shapes, cameras = "shapes, {0}", "a camera over photographs, {0}"
    head = [form.format(size) for size in ("128x128", "256x256") for form in (shapes, cameras)]
    assert f"| what | {' | '.join(head)} |" in text
    assert "| PSNR of the VAE on held-out clips | 38.8 dB | 31.2 dB | 44.4 dB | 31.2 dB |" in text
    assert "93 of 100 (0.863 to 0.966)" in text and "27.1 dB" in text and "24 of 25" in text
    assert "27.1 dB = camera/last_frame_psnr" in text and "tiny-quality-256.json: " in text
    assert "(0123456789ab-dirty, torch 2.11.0)" in text  # one of several versions, by the file itself
    assert "| SSIM, MS-SSIM of the same | 0.976, 0.977 | 0.875, 0.875 |" in tables.pages(root)[words.CARD]


def test_schemes_are_shown_on_photographs(root: Path) -> None:
    for scheme in words.SCHEMES:
        file = root / tables.RESULTS / f"tiny-quality-{scheme}.json"
        row = {"right": 48, "of": 50}
        settings = json.loads(file.read_text())["settings"] | {"quantize": scheme}
        camera = {"psnr_unquantized": 50.06, "ssim_unquantized": 0.99914, "prompt_following": row}
        shapes = {"psnr_unquantized": 54.21, "ssim_unquantized": 0.99996, "prompt_following": {"right": 99, "of": 100}}
        change(file, camera=camera, settings=settings, **shapes)
    exact = root / tables.RESULTS / "tiny-quality.json"
    change(exact, prompt_following=row, camera={"prompt_following": row})
    text = tables.pages(root)["docs/quantization.md"]
    assert "| scheme | shapes: PSNR, SSIM, prompts followed | a camera over photographs |" in text
    assert "| none | 48 of 50 | 48 of 50 |" in text
    assert "| `fp8-rowwise` | 54.2 dB, 1.0000, 99 of 100 | 50.1 dB, 0.9991, 48 of 50 |" in text


@pytest.mark.parametrize("note", [None, "photographs become patterns"])
def test_the_readme_repeats_the_note_of_the_weights(note: str | None, root: Path) -> None:
    change(root / "wanfast/assets/tiny/wanfast.json", weights_note=note)
    text = tables.pages(root)["README.md"]
    assert ("A note says so: photographs become patterns." in text) == (note is not None)
    assert text.count("A note says so") == (note is not None)
    jobs = root / words.EXAMPLES / "jobs.jsonl"
    jobs.write_text(json.dumps({"image": "dog.jpg", "prompt": "Zoom in.", "output": "out/dog.mp4"}))
    assert (
        f']({words.EXAMPLES}/dog.jpg) "Zoom in." | ![the video of the dog](docs/dog.png) |'
        in tables.pages(root)["README.md"]
    )


def test_the_card_names_each_photograph_its_licence_and_its_author() -> None:
    card = (ROOT / words.CARD).read_text()
    for picture in json.loads((ROOT / "training/photographs.json").read_text()):
        package, name = picture["name"].split("/")
        star = r"\\\*" if picture["held_out"] else r"(?!\\)"
        author = re.escape(picture["author"].partition(" <")[0])
        licence = re.escape(picture["licence"])
        assert re.search(rf"^\| {package} \| {licence} \| {author} \|.*[ ,]{re.escape(name)}{star}[ ,]", card, re.M), (
            picture
        )


def test_other_weights_make_all_tables_stale_and_a_made_one_is_current(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu = [name for name, table in tables.TABLES.items() if not (table.needs_gpu or name in tables.left_out())]
    assert tables.stale(tables.made(root), "other") == on_a_cpu
    assert tables.stale({}, "other") == on_a_cpu
    ran: list[list[str]] = []
    codes = [0, 2]

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, codes[len(ran) - 1])

    monkeypatch.setattr(tables, "ROOT", root)
    monkeypatch.setattr(tables, "weights", lambda: "other")
    monkeypatch.setattr(tables, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["tiny_tables.py"])
    with pytest.raises(SystemExit, match="`make tiny-examples` ended with 2: fix what it printed"):
        tables.main()
    assert [command[1] for command in ran] == ["tiny-preset", "tiny-examples"]
    assert tables.stale(tables.made(root), "other") == on_a_cpu[1:]
    assert tables.made(root)["tiny-preset"]["commit"] == "0123456789ab"


def test_kinds_and_lossy_attention_are_made_and_their_pages_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = root / tables.RESULTS
    (results / "tiny-kinds.json").unlink(missing_ok=True)
    for page, text in tables.pages(root).items():
        (root / page).write_text(text)

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert env["WANFAST_COMMIT"] == "0123456789ab"  # the present one, before a table changes the tree
        if command[1] == "tiny-kinds":
            (results / "tiny-kinds.json").write_text(json.dumps(measured_kinds()))
        elif command[1] == "tiny-attention":
            document = json.loads((results / "tiny-attention.json").read_text())
            document["rows"][1]["psnr_dense"] = 12.34
            (results / "tiny-attention.json").write_text(json.dumps(document))
        return subprocess.CompletedProcess(command, 0)

    for name, page in (("ROOT", root), ("weights", lambda: "other"), ("commit", lambda: "0123456789ab")):
        monkeypatch.setattr(tables, name, page)
    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["tiny_tables.py", "tiny-kinds", "tiny-attention"])
    assert "Not measured yet" in (root / "docs/kinds.md").read_text()
    tables.main()
    kinds, sparse = ((root / f"docs/{page}.md").read_text() for page in ("kinds", "sparse-attention"))
    assert "Not measured yet" not in kinds and "| 34.0 dB, 32.0 dB | 27.3 dB, 25.3 dB |" in kinds
    assert "12.3 dB = rows/1/psnr_dense" in sparse
    known = tables.made(root)
    for name in ("tiny-kinds", "tiny-attention"):
        assert known[name] == {"weights": "other", "commit": "0123456789ab", "minutes": 0.0}


def test_a_new_pair_makes_the_tables_that_show_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "PAIR", tmp_path / "lightning-4")
    known = {name: {"weights": tables.judged_by(name, "these")} for name in tables.TABLES}
    assert {row["weights"] for row in known.values()} == {"these"}
    assert tables.stale({}, "these") == [name for name in tables.TABLES if name not in ("tiny-few-steps", GPU)]
    monkeypatch.setattr(tables, "made", lambda _: known)
    monkeypatch.setattr(tables, "weights", lambda: "these")
    monkeypatch.setattr(tables, "pages", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["tiny_tables.py"])
    tables.main()
    assert "tiny-few-steps: left out, because the tiny model has no loras/lightning-4 yet\n" in capsys.readouterr().out

    (tmp_path / "lightning-4").mkdir()
    for content in ("one", "another"):
        (tmp_path / "lightning-4/low_noise.safetensors").write_text(content)
        assert tables.stale(known, "these") == ["tiny-magcache", "tiny-few-steps"]
        known |= {name: {"weights": tables.judged_by(name, "these")} for name in tables.TABLES}
        assert tables.stale(known, "these") == [] and known["tiny-quality"]["weights"] == "these"


def fewer_forwards(settings: str, plan: str) -> dict[str, Any]:
    followed = {"right": 39, "of": 40}
    quality = {"psnr_unskipped": 42.84, "ssim_unskipped": 0.99534, "prompt_following": followed}
    return {"settings": settings, "plan": plan, "skipped_share": 0.25, **quality}


def test_gates_and_the_hybrid_get_a_table(root: Path) -> None:
    page = "docs/few-steps.md"
    change(root / tables.RESULTS / "tiny-magcache.json", gates_and_hybrid=[])
    assert "gate and the hybrid cost was not measured yet" in " ".join(tables.pages(root)[page].split())
    rows = [fewer_forwards("gate 0.5", "no skips"), fewer_forwards("hybrid, E012K2R20, both-experts", "extrapolated")]
    change(root / tables.RESULTS / "tiny-magcache.json", gates_and_hybrid=rows)
    text = tables.pages(root)[page]
    assert "| gate 0.5 | 25.0 % | no skips | 42.8 dB, 0.9953, 39 of 40 |" in text
    assert "| hybrid, E012K2R20, both-experts | 25.0 % | extrapolated |" in text
    assert "25.0 % = gates_and_hybrid/0/skipped_share * 100" in text
    assert "| gate 0.5 |" not in tables.pages(root)["docs/magcache.md"]


def test_a_distilled_pair_gets_a_table(root: Path) -> None:
    file, page = root / tables.RESULTS / "tiny-few-steps.json", "docs/few-steps.md"
    file.unlink(missing_ok=True)
    assert "no distilled pair ships for the tiny model" in tables.pages(root)[page]
    alone = {"prompt_following": {"right": 96, "of": 100}, "first_frame_psnr": 41.06}
    compared = alone | {"psnr_teacher": {"mean": 33.333}}
    paired = compared | {"paired_psnr": {"mean": 1.234, "95%": [-0.456, 2.9]}}
    ways = {"teacher": alone, "student": compared, "plain, guided": paired}
    shape = [{"way": way, "forwards": 4 + k, **row} for k, (way, row) in enumerate(ways.items())]
    about = {"versions": {"torch": "2.13.0+cpu"}, "commit": "0123456789ab"}
    file.write_text(json.dumps({"shape": shape, "camera": shape[:1], **about}))
    text = tables.pages(root)[page]
    assert "| shapes | teacher | 4 | 96 of 100 | 41.1 dB |  |  |" in text
    assert "| shapes | student | 5 | 96 of 100 | 41.1 dB | 33.3 dB |  |" in text
    assert "| shapes | plain, guided | 6 | 96 of 100 | 41.1 dB | 33.3 dB | +1.23 (-0.46 to +2.90) |" in text
    assert "| a camera over photographs | teacher | 4 |" in text and "(0123456789ab)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiny"], "NAME 'tiny': use one of tiny-preset, "),
        (["--pages", "tiny-bench"], "--pages makes no table: drop --pages"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny_tables.py", *options])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_curve_that_ships_is_what_a_calibration_measured() -> None:
    """The document has the form of the file, and the ratios are rounded to five digits."""
    preset = program("tiny_preset")
    text = preset.PRESET.read_text()
    shipped = json.loads(text)
    inputs = {name: shipped[name] for name in ("steps", "shift", "solver", "boundary", "experts")}
    inputs |= {"precision": "bf16", "guidance": {"high_noise": 2.0, "low_noise": 2.0}}
    measured = {
        "inputs": inputs,
        "clips": 4,
        "ratios": [[ratio + 3e-6 for ratio in pair] for pair in shipped["ratios"]],
    }
    document = preset.preset(measured)
    assert document == shipped
    assert preset.text_of(document) == text


def test_the_matrix_of_float8_attention_is_judged_by_two_videos_that_wanfast_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = program("tiny_lossy")
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        mean = {"attention_check": {"mean": 0.25 if "--no-fp8-hadamard" in command else 0.125}}
        return subprocess.CompletedProcess(command, 0, stdout=f"note\n{json.dumps(mean)}\n")

    monkeypatch.setattr(lossy.subprocess, "run", run)
    monkeypatch.setattr(lossy, "commit", lambda: None)
    monkeypatch.setattr(lossy, "versions", dict)
    monkeypatch.setattr(lossy, "decoder_psnr", lambda: 61.234)
    monkeypatch.setattr(sys, "argv", ["tiny_lossy.py", "--output", str(tmp_path / "lossy.json")])
    lossy.main()
    document = json.loads((tmp_path / "lossy.json").read_text())
    assert document == json.loads(capsys.readouterr().out)
    assert (document["error_without_hadamard"], document["decoder_bf16_psnr"]) == (2.0, 61.23)
    for command in ran:
        context = typer.main.get_command(app).commands["generate"].make_context("generate", command[4:])  # type: ignore[attr-defined]
        assert context.params["attention"] == "fa3-fp8" and context.params["attention_check"]
        assert Path(context.params["image"]).exists()
