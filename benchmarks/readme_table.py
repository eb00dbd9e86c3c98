"""Writes the table of published lines in README.md from the reports of `wanfast bench` on one GPU, four and eight.

    python benchmarks/readme_table.py      # writes README.md's table and benchmarks/results/readme-table.json

The reports are files of benchmarks/results whose names begin with the number and the kind of GPUs: bench-1xh100,
bench-4xh100, bench-8xh100, or the same with h200. Each one is the document that `wanfast bench --recipes published,ours
--num-gpus 4 --fit crop --json` prints last. If several of one beginning have a recipe, the last one counts, by the
order of their names; whole videos count before an estimate from few steps. Only reports of the published videos are
taken: the A14B, 1280x720, 81 frames, 40 steps. Each number of GPUs that was measured has a column, of one kind of GPU:
the kind that has reports of the most numbers, and of two that have as many an H100. The last column projects the
seconds of four GPUs to eight of that kind, by the model of docs/projection.md. A cell without a measurement is a dash,
and the legend says why. A test writes the table again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cost_model import STEPS, mesh_of, on_more_gpus, tokens_of
from page_block import declaration, with_block
from projection import RESULTS, ROOT, Fitted, fitted

from wanfast.bench.published import PUBLISHED_S
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.facts.choices import RecipeName
from wanfast.runtime.facts.model_spec import A14B

OWN = RESULTS / "readme-table.json"
KINDS = ("H100", "H200")
COUNTS = (1, 4, 8)  # of GPUs
PROJECTED = 4  # the number of GPUs whose seconds are projected to 8
NOT_YET = "not measured yet"
SIZE = "1280x720"
VIDEO = {"model": A14B.name, "size": SIZE, "frames": 81, "steps": STEPS}  # of the published seconds
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
    "near-exact": "ours, fp8 linears and attention",
    "fast": "ours, fp8 linears and attention, MagCache in both experts",
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
    """Returns the columns of the table, and its rows: {recipe: its seconds in each column, or why it has none}."""
    found = fitted(results)
    rows: dict[str, dict[str, Any]] = {
        recipe: {"published_s": PUBLISHED_S.get(recipe), "on": {}, "projected_8_s": None} for recipe in LINES
    }
    columns = _columns(results)
    for count, gpu in columns.items():
        for row in rows.values():
            row["on"][str(count)] = {"video_s": None, "estimated": False, "why": NOT_YET}
        for file, report in _reports(results, count, gpu):
            for measured in report["rows"]:
                if (row := rows.get(measured["recipe"])) is None:
                    continue  # a recipe of few steps, which has no line here
                known, new = row["on"][str(count)], _figures(measured, count)
                if _worth(new) >= _worth(known):
                    row["on"][str(count)] = new | {"file": file.name}
                    if count == PROJECTED and new["video_s"] is not None:
                        row["projected_8_s"] = _projected_8_s(measured, report, found)
    gpus = {str(count): gpu for count, gpu in columns.items()}
    errors = {"gpu": found.kind.upper(), "error_on_4": found.error_on(4), "error_on_8": found.error_on(8)}
    return {"gpus": gpus, "projection": errors, "rows": rows}


def _worth(figures: dict[str, Any]) -> int:
    """Returns 2 for the seconds of whole videos, 1 for seconds estimated from few steps, 0 for none."""
    return 0 if figures["video_s"] is None else 2 - figures["estimated"]


def _columns(results: Path) -> dict[int, str]:
    """Returns the kind of GPU for each number of GPUs that was measured; without any report, four H100."""
    counts = {gpu: [count for count in COUNTS if _files(results, count, gpu)] for gpu in KINDS}
    by_counts = sorted(KINDS, key=lambda gpu: -len(counts[gpu]))  # stable: an H100 comes first of two that are equal
    found = {count: [gpu for gpu in by_counts if count in counts[gpu]] for count in COUNTS}
    return {count: gpus[0] for count, gpus in found.items() if gpus} or {PROJECTED: KINDS[0]}


def _files(results: Path, count: int, gpu: str) -> list[Path]:
    return sorted(results.glob(f"bench-{count}x{gpu.lower()}*.json"), key=lambda file: file.stem)


def _reports(results: Path, count: int, gpu: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in _files(results, count, gpu):
        report = json.loads(file.read_text())
        if not report["machine"].startswith(f"{count} x NVIDIA {gpu}"):
            raise SystemExit(
                f"{file}: measured on {report['machine']}, not on {count} x NVIDIA {gpu}: give the file another name"
            )
        sizes = dict.fromkeys(clip["video_size"] for clip in report["clips"])
        measured = {name: report[name] for name in VIDEO} | {"size": " and ".join(sizes)}
        if measured != VIDEO:
            said, wanted = (", ".join(f"{name} {value}" for name, value in of.items()) for of in (measured, VIDEO))
            raise SystemExit(f"{file}: measured with {said}, not with {wanted}: measure it again as docs/bench.md says")
        yield file, report


def _figures(row: dict[str, Any], count: int) -> dict[str, Any]:
    why = None if row["status"] == "measured" else row["status"]
    if why is None and row["overridden"]:
        why = f"measured with {' '.join(row['overridden'])}"
    if why is None and row["recipe_options"] != RECIPES[row["recipe"]].given({"num_gpus": count}):
        why = "measured when this recipe had other options"
    seconds = None if why else row["video_s"]["median"]
    return {"video_s": seconds, "estimated": bool(seconds and row["estimated"]), "why": why}


def _projected_8_s(row: dict[str, Any], report: dict[str, Any], found: Fitted) -> float:
    width, height = map(int, SIZE.split("x"))
    seconds = {stage: spread["median"] for stage, spread in row["seconds"].items()}
    cfg = RECIPES[row["recipe"]].of_several_ranks.get("cfg_parallel")
    meshes = mesh_of(PROJECTED, cfg), mesh_of(8, cfg)
    tokens = tokens_of(width, height, report["frames"])
    on_8 = on_more_gpus(found.model, seconds, row["forwards"]["computed"], tokens, meshes)
    return round(sum(on_8.values()), 3)


def lines(document: dict[str, Any]) -> list[str]:
    """Returns the lines of the table, of its legend and of the declaration of its figures."""
    figures: dict[str, str] = {}
    gpus = document["gpus"]

    def cell(recipe: str, path: str) -> str:
        value: Any = document["rows"][recipe]
        for key in path.split("/"):
            value = value[key]
        if value is None:
            return "—"
        figures.setdefault(f"{value:.1f} s", f"rows/{recipe}/{path}")
        return f"{value:.1f} s"

    columns = {"published_s": "the publisher's, on 8 H100"}
    columns |= {f"on/{count}/video_s": f"ours on {count} {gpu}" for count, gpu in gpus.items()}
    if gpu := gpus.get(str(PROJECTED)):
        columns["projected_8_s"] = f"ours projected to 8 {gpu}"
    head = ["published line", "recipe", *columns.values()]
    made = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for recipe, line in LINES.items():
        cells = " | ".join(cell(recipe, path) for path in columns)
        made.append(f"| {line} | `{recipe}` | {cells} |")
    return [*made, "", _legend(document, figures), *declaration(OWN, figures)]


def _legend(document: dict[str, Any], figures: dict[str, str]) -> str:
    """Returns what the seconds are, why cells have dashes, and how far the projection is known."""
    rows = document["rows"].values()
    parts = ["Seconds of one video; ours are encoding, denoising and decoding."]
    if any(of["estimated"] for row in rows for of in row["on"].values()):
        parts.append("The seconds of denoising were computed from a few timed steps.")
    parts.append("A dash: not published, or not measured.")
    for count, gpu in document["gpus"].items():
        parts += _missing(document["rows"], count, gpu)
    kind, fitted_on = document["gpus"].get(str(PROJECTED)), document["projection"]["gpu"]
    if any(row["projected_8_s"] for row in rows) and kind != fitted_on:
        parts.append(f"The model that projects the seconds of {kind} was fitted on {fitted_on}.")
    return " ".join([*parts, _known(document["projection"], figures)])


def _missing(rows: dict[str, dict[str, Any]], count: str, gpu: str) -> list[str]:
    """Returns the sentences that say why cells of a column have dashes."""
    missing: dict[str, list[str]] = {}
    for recipe, row in rows.items():
        if why := row["on"][count]["why"]:
            missing.setdefault(why, []).append(f"`{recipe}`")
    if len(missing.get(NOT_YET, ())) == len(rows):
        needed = ", and the projected seconds are computed from such measurements" if count == str(PROJECTED) else ""
        return [f"Nothing was measured on {count} {gpu} yet{needed}."]
    return [f"On {count} {gpu}, {', '.join(names)}: {why}." for why, names in missing.items()]


def _known(projection: dict[str, Any], figures: dict[str, str]) -> str:
    """Returns how far the projection was from what was measured on four GPUs and on eight."""
    said = []
    for number in (4, 8):
        name = f"error_on_{number}"
        if (error := projection[name]) is not None:
            figure = f"{abs(error) * 100:.1f} %"
            figures.setdefault(figure, f"{'0 - ' if error < 0 else ''}projection/{name} * 100")
            side = "below" if error < 0 else "above"
            said.append(f"{figure} {side} what was measured on {number} {projection['gpu']}")
    page = "[projection](docs/projection.md)"
    if not said:
        return f"No measurement on 4 or 8 GPUs has checked the {page} yet."
    return f"The {page} is {' and '.join(said)}."


if __name__ == "__main__":
    main()
