"""Writes the table of published lines in README.md from the reports of `wanfast bench` on four H100.

    python benchmarks/readme_table.py      # writes README.md's table and benchmarks/results/readme-table.json

The reports are the files benchmarks/results/bench-4xh100*.json. Each holds the last line that `wanfast bench --recipes
published,ours --num-gpus 4 --json` prints. If several reports measured a recipe, the report whose name sorts last
counts. The last column projects the measured seconds to 8 GPUs by the model of docs/projection.md. A cell without a
measurement is a dash, and the legend says why. A test compares README.md with what this program writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_block import declaration, with_block
from projection import RESULTS, ROOT, Fitted, fitted

from wanfast.bench.projection import NOT_CHECKED, mesh_of, on_more_gpus, tokens_of
from wanfast.bench.published import PUBLISHED_S
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.facts.choices import RecipeName

OWN = RESULTS / "readme-table.json"
REPORTS, MACHINE = "bench-4xh100*.json", "4 x NVIDIA H100"
NOT_YET = "not measured yet"
LINES: Mapping[RecipeName, str] = {
    "baseline": "FlashAttention-2",
    "fa3": "FlashAttention-3",
    "fa3-tf32": "FlashAttention-3, TF32",
    "int8": "FlashAttention-3, int8 weights",
    "magcache": "FlashAttention-3, MagCache E012K2R20",
    "magcache-tf32": "FlashAttention-3, TF32, MagCache E012K2R20",
    "compile": "FlashAttention-3, compiled",
    "compile-int8": "FlashAttention-3, compiled, int8 weights",
    "compile-tf32": "FlashAttention-3, TF32, compiled",
    "fastest-original": "FlashAttention-3, TF32, compiled, MagCache E012K2R20",
    "fastest-original-k2r10": "the same with E012K2R10",
    "fastest-original-e024k2r10": "the same with E024K2R10",
    "exact": "ours",
    "near-exact": "ours, fp8 linears",
    "fast": "ours, fp8 linears, MagCache in both experts",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with README.md and benchmarks/results")
    root = parser.parse_args().root
    document = table(root / RESULTS)
    (root / OWN).write_text(json.dumps(document, indent=1) + "\n")
    page = root / "README.md"
    page.write_text(with_block(page.read_text(), "published lines", lines(document)))
    print(json.dumps(document))


def table(results: Path) -> dict[str, Any]:
    """Returns {"rows": {recipe: its seconds, or why it has none}, "error_on_4": the projection's error on 4 GPUs}.

    Ends the process with a message if a report comes from other GPUs.
    """
    found = fitted(results)
    rows: dict[str, dict[str, Any]] = {
        recipe: {"published_s": PUBLISHED_S.get(recipe), "on_4_s": None, "on_8_s": None, "why": NOT_YET}
        for recipe in LINES
    }
    for file in sorted(results.glob(REPORTS), key=lambda file: file.stem):
        report = json.loads(file.read_text())
        if not report["machine"].startswith(MACHINE):
            raise SystemExit(f"{file}: measured on {report['machine']}, not on {MACHINE}: give the file another name")
        for row in report["rows"]:
            known, new = rows[row["recipe"]], _figures(row, report, found)
            if "on_4_s" in new or known["on_4_s"] is None:
                known |= new | {"file": file.name}
    return {"error_on_4": found.error_on_4, "rows": rows}


def _figures(row: dict[str, Any], report: dict[str, Any], found: Fitted) -> dict[str, Any]:
    if row["status"] != "measured":
        return {"why": row["status"]}
    if row["overridden"]:
        return {"why": f"measured with {' '.join(row['overridden'])}"}
    width, height = map(int, report["size"].split("x"))
    seconds = {stage: spread["median"] for stage, spread in row["seconds"].items()}
    cfg = RECIPES[row["recipe"]].of_several_ranks.get("cfg_parallel")
    meshes = mesh_of(4, cfg), mesh_of(8, cfg)
    tokens = tokens_of(width, height, report["frames"])
    on_8 = on_more_gpus(found.model, seconds, row["forwards"]["computed"], tokens, meshes)
    estimated = bool(row["estimated"])
    on_4_s = row["video_s"]["median"]
    return {"on_4_s": on_4_s, "on_8_s": round(sum(on_8.values()), 3), "estimated": estimated, "why": None}


def lines(document: dict[str, Any]) -> list[str]:
    """Returns the lines of the table, of its legend and of the declaration of its figures."""
    figures: dict[str, str] = {}
    rows = document["rows"]

    def cell(recipe: str, column: str) -> str:
        if rows[recipe][column] is None:
            return "—"
        figure = f"{rows[recipe][column]:.1f} s"
        figures.setdefault(figure, f"rows/{recipe}/{column}")
        return figure

    head = ["published line", "recipe", "the publisher's, on 8 H100", "ours on 4 H100", "ours projected to 8"]
    made = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for recipe, line in LINES.items():
        cells = [cell(recipe, column) for column in ("published_s", "on_4_s", "on_8_s")]
        made.append(f"| {line} | `{recipe}` | {' | '.join(cells)} |")
    return [*made, "", _legend(document, figures), *declaration(OWN, figures)]


def _legend(document: dict[str, Any], figures: dict[str, str]) -> str:
    """Returns what the seconds are, why cells have dashes, and how far the projection is known."""
    rows = document["rows"]
    missing: dict[str, list[str]] = {}
    for recipe, row in rows.items():
        if row["why"]:
            missing.setdefault(row["why"], []).append(f"`{recipe}`")
    parts = ["Seconds of one video; ours are encoding, denoising and decoding."]
    if any(row.get("estimated") for row in rows.values()):
        parts.append("The seconds of denoising were computed from a few timed steps.")
    parts.append("A dash: not published, or not measured.")
    if list(missing) == [NOT_YET] and len(missing[NOT_YET]) == len(rows):
        parts.append("Nothing was measured on 4 H100 yet, so that nothing is projected.")
    else:
        parts += [f"On 4 H100, {', '.join(names)}: {why}." for why, names in missing.items()]
    known = NOT_CHECKED
    if (error := document["error_on_4"]) is not None:
        figure = f"{abs(error) * 100:.1f} %"
        figures.setdefault(figure, f"{'0 - ' if error < 0 else ''}error_on_4 * 100")
        known = f"{figure} {'below' if error < 0 else 'above'} what was measured on 4"
    parts.append(f"The [projection](docs/projection.md) is {known}.")
    return " ".join(parts)


if __name__ == "__main__":
    main()
