"""Tests README's table of published lines: current, filled by reports of 1, 4 and 8 GPUs, a reason for each dash."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.results import ROOT, of_published_size, program, results_of_two
from wanfast.runtime.config.recipes import FEW_STEPS, RECIPES

readme_table = program("readme_table")
mesh_of = program("cost_model").mesh_of
FULL_NAMES = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}


def row(recipe: str, denoise_s: float, **changes: Any) -> dict[str, Any]:
    seconds = {"encode": 0.5, "denoise": denoise_s, "decode": 1.0}
    return {
        "recipe": recipe,
        "status": "measured",
        "overridden": [],
        "seconds": {stage: {"median": value} for stage, value in seconds.items()},
        "video_s": {"median": sum(seconds.values())},
        "forwards": {"computed": 80.0, "of": 80},
        "estimated": None,
    } | changes


def report(*rows: dict[str, Any], on: str = "4 x H100") -> dict[str, Any]:
    count, gpu = on.split(" x ")
    rows_of = [{**row, "recipe_options": RECIPES[row["recipe"]].given({"num_gpus": int(count)}), **row} for row in rows]
    return of_published_size(f"{count} x {FULL_NAMES[gpu]}") | {"rows": rows_of}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return results_of_two(tmp_path)


def write(results: Path, name: str, document: dict[str, Any]) -> None:
    (results / f"{name}.json").write_text(json.dumps(document))


def test_the_table_in_the_readme_is_that_of_the_results() -> None:
    document = readme_table.table(ROOT / readme_table.RESULTS)
    assert json.loads((ROOT / readme_table.OWN).read_text()) == document, "run `make readme-table`"
    page = (ROOT / "README.md").read_text()
    assert readme_table.with_block(page, "published lines", readme_table.lines(document)) == page
    assert list(readme_table.LINES) == [name for name in RECIPES if name not in FEW_STEPS]  # these need other weights


def test_without_a_report_each_measured_cell_is_a_dash(results: Path) -> None:
    lines = readme_table.lines(readme_table.table(results))
    assert lines[2] == "| FlashAttention-2 | `baseline` | 250.7 s | — | — |"
    assert all(line.endswith("| — | — |") for line in lines[2:17])
    assert lines[0].endswith("| ours on 4 H100 | ours projected to 8 H100 |")
    page = "[projection](docs/projection.md)"
    nothing = "Nothing was measured on 4 H100 yet, and the projected seconds are computed from such measurements."
    assert lines[18].endswith(f"{nothing} No measurement on 4 or 8 GPUs has checked the {page} yet.")


def test_a_measured_recipe_has_its_seconds_and_a_projection(results: Path) -> None:
    """The published lines compute both branches on all ranks; ours compute each branch on half of them."""
    write(results, "bench-4xh100", report(row("baseline", 400.0), row("exact", 200.0, estimated="a few")))
    document = readme_table.table(results)
    found = readme_table.fitted(results).model
    for recipe, denoise_s, cfg in (("baseline", 400.0, 1), ("exact", 200.0, 2)):
        four, eight = (found.forward(75_600, mesh_of(number, cfg).ulysses)["exchange"] for number in (4, 8))
        denoise_8_s = 80 / cfg * ((denoise_s * cfg / 80 - four) / 2 + eight)
        of = document["rows"][recipe]
        assert of["on"]["4"]["video_s"] == denoise_s + 1.5
        assert denoise_8_s < of["projected_8_s"] < denoise_8_s + 1.5
    lines = readme_table.lines(document)
    on_8 = document["rows"]["baseline"]["projected_8_s"]
    assert lines[2] == f"| FlashAttention-2 | `baseline` | 250.7 s | 401.5 s | {on_8:.1f} s |"
    assert "401.5 s = rows/baseline/on/4/video_s" in lines[-1]
    assert f"{on_8:.1f} s = rows/baseline/projected_8_s" in lines[-1]
    assert "The seconds of denoising were computed from a few timed steps." in lines[18]
    assert "The model that projects the seconds of H100 was fitted on H200." in lines[18]
    document["projection"]["gpu"] = "H100"
    assert "was fitted on" not in readme_table.lines(document)[18]


def test_the_legend_says_why_a_cell_is_a_dash(results: Path) -> None:
    others = row("fa3", 1.0, overridden=["--attention", "auto"]), row("int8", 1.0, status="failed")
    write(results, "bench-4xh100", report(row("baseline", 400.0), *others))
    document = readme_table.table(results)
    legend = readme_table.lines(document)[18]
    assert "`fa3`: measured with --attention auto." in legend and "`int8`: failed." in legend
    assert "`exact`" in legend and "not measured yet" in legend and "baseline" not in legend
    assert document["rows"]["fa3"]["on"]["4"]["video_s"] is None


def test_the_last_report_counts_and_a_failure_hides_no_measurement(results: Path) -> None:
    write(results, "bench-4xh100", report(row("baseline", 400.0), row("fa3", 300.0)))
    others = row("fa3", 1.0, status="failed"), row("fa3", 1.0, overridden=["--attention", "auto"])
    write(results, "bench-4xh100-second", report(row("baseline", 390.0), *others))
    rows = {name: row["on"]["4"] for name, row in readme_table.table(results)["rows"].items()}
    assert (rows["baseline"]["video_s"], rows["baseline"]["file"]) == (391.5, "bench-4xh100-second.json")
    assert (rows["fa3"]["video_s"], rows["fa3"]["why"]) == (301.5, None)


def test_an_estimate_never_replaces_whole_videos(results: Path) -> None:
    write(results, "bench-4xh100", report(row("exact", 203.0), row("fa3", 300.0, estimated="a few")))
    write(results, "bench-4xh100-few", report(row("exact", 1.0, estimated="a few"), row("fa3", 290.0)))
    rows = {name: row["on"]["4"] for name, row in readme_table.table(results)["rows"].items()}
    assert (rows["exact"]["video_s"], rows["fa3"]["video_s"]) == (204.5, 291.5)


def test_each_measured_number_of_gpus_has_a_column(results: Path) -> None:
    """The kind with the most numbers of GPUs comes first, and only what it lacks is of the other kind."""
    write(results, "bench-1xh200", report(row("baseline", 1600.0), on="1 x H200"))
    others = row("exact", 1.0, status="failed"), row("lightning-4", 5.0)  # the latter has no line in the table
    write(results, "bench-8xh200", report(row("baseline", 210.0), *others, on="8 x H200"))
    document = readme_table.table(results)
    assert document["gpus"] == {"1": "H200", "8": "H200"}
    lines = readme_table.lines(document)
    assert lines[0].endswith("| the publisher's, on 8 H100 | ours on 1 H200 | ours on 8 H200 |")
    assert lines[2] == "| FlashAttention-2 | `baseline` | 250.7 s | 1601.5 s | 211.5 s |"
    assert "On 8 H200, `exact`: failed." in lines[18] and "`exact`, `near-exact`, `fast`: not measured yet" in lines[18]
    assert "211.5 s = rows/baseline/on/8/video_s" in lines[-1]

    write(results, "bench-4xh100", report(row("baseline", 400.0)))
    document = readme_table.table(results)
    assert document["gpus"] == {"1": "H200", "4": "H100", "8": "H200"}
    assert readme_table.lines(document)[0].endswith(
        "| ours on 1 H200 | ours on 4 H100 | ours on 8 H200 | ours projected to 8 H100 |"
    )


def test_no_column_has_two_kinds_of_gpu(results: Path) -> None:
    write(results, "bench-4xh200", report(row("baseline", 380.0), on="4 x H200"))
    write(results, "bench-4xh100", report(row("fa3", 300.0)))
    rows = readme_table.table(results)["rows"]
    assert (rows["baseline"]["on"]["4"]["video_s"], rows["fa3"]["on"]["4"]["video_s"]) == (None, 301.5)
    write(results, "bench-8xh200", report(row("baseline", 210.0), on="8 x H200"))
    document = readme_table.table(results)
    assert document["gpus"] == {"4": "H200", "8": "H200"}
    found = document["rows"]["baseline"]
    assert (found["on"]["4"]["video_s"], found["on"]["8"]["video_s"]) == (381.5, 211.5)
    assert document["rows"]["fa3"]["on"]["4"] == {"video_s": None, "estimated": False, "why": readme_table.NOT_YET}


@pytest.mark.parametrize(
    ("name", "machine", "wanted"),
    [
        ("bench-4xh100", "2 CPU cores", "4 x NVIDIA H100"),
        ("bench-4xh100", "4 x NVIDIA H200", "4 x NVIDIA H100"),
        ("bench-8xh200", "4 x NVIDIA H200", "8 x NVIDIA H200"),
        ("bench-1xh200", "NVIDIA H200", "1 x NVIDIA H200"),
    ],
)
def test_a_report_of_another_machine_is_refused(results: Path, name: str, machine: str, wanted: str) -> None:
    write(results, name, report() | {"machine": machine})
    with pytest.raises(SystemExit, match=f"measured on {machine}, not on {wanted}: give the file another"):
        readme_table.table(results)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "tiny"},
        {"frames": 17},
        {"steps": 20},
        {"clips": [{"video_size": "1280x720"}, {"video_size": "1168x768"}]},
    ],
)
def test_a_report_of_another_video_is_refused(results: Path, changes: dict[str, Any]) -> None:
    write(results, "bench-4xh100", report(row("baseline", 400.0)) | changes)
    said = r"bench-4xh100.json: measured with .*, not with model Wan2.2-I2V-A14B, size 1280x720, frames 81, steps 40: "
    with pytest.raises(SystemExit, match=said):
        readme_table.table(results)


def test_a_recipe_that_had_other_options_is_a_dash(results: Path) -> None:
    earlier = row("near-exact", 100.0, recipe_options={"quantize": "fp8-rowwise"})
    write(results, "bench-4xh100", report(row("baseline", 400.0), earlier))
    document = readme_table.table(results)
    assert document["rows"]["near-exact"]["on"]["4"]["video_s"] is None
    assert "`near-exact`: measured when this recipe had other options." in readme_table.lines(document)[18]


def test_the_projections_errors_stand_in_the_legend(results: Path) -> None:
    document = readme_table.table(results)
    document["projection"]["error_on_4"] = -0.0312
    lines = readme_table.lines(document)
    assert "is 3.1 % below what was measured on 4 H200." in lines[18]
    assert "3.1 % = 0 - projection/error_on_4 * 100" in lines[-1]
    document["projection"]["error_on_8"] = 0.021
    lines = readme_table.lines(document)
    assert "measured on 4 H200 and 2.1 % above what was measured on 8 H200." in lines[18]
    assert "2.1 % = projection/error_on_8 * 100" in lines[-1]


def test_the_program_writes_the_page(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = results.parents[1]
    (root / "README.md").write_text("a\n<!-- published lines: x -->\nold\n<!-- end of published lines -->\nb\n")
    write(results, "bench-4xh100", report(row("baseline", 400.0)))
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--root", str(root)])
    readme_table.main()
    text = (root / "README.md").read_text()
    assert text.startswith("a\n<!-- published lines: x -->\n| published line") and text.endswith("-->\nb\n")
    assert "401.5 s" in text and "old" not in text
    assert json.loads((results / "readme-table.json").read_text())["rows"]["baseline"]["on"]["4"]["video_s"] == 401.5
    (root / "README.md").write_text("a\n")
    with pytest.raises(SystemExit, match="the page has no part between <!-- published lines"):
        readme_table.main()
