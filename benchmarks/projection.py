"""Projects the time of whole videos on 8 GPUs from JSON files of benchmarks/results, and checks it with 4 GPUs and 8.

    python benchmarks/projection.py      # writes benchmarks/results/projection.json, docs/projection.svg and the tables

docs/projection.md explains the cost model, and this program writes the tables of the page. The model is fitted on
measurements of a forward, of the VAE and of whole videos on one GPU and on two. If files of four or of eight GPUs are
in the folder, the model is compared with them: forward-4xGPU.json, vae-4xGPU.json and whole-video-random-4xGPU.json,
or the same with 8x, where GPU is h100 or h200. The kind with files of the most GPUs is taken. Its forward-4xGPU.json
also has times of one GPU and of two from the same run. If this file exists, the forward is fitted on these times. A
file of the fit that is missing for an H100 is replaced by the file of the H200; files of the check are never replaced.
A test runs this program and compares what it writes with the page, so that the tables follow the JSON files.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_model import NOT_CHECKED, STEPS, TERMS, CostModel, WholeVideo, checks, fit, mesh_of
from page_block import declaration, with_block

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
OWN = RESULTS / "projection.json"
GPUS = (1, 2, 4, 8)
CHECKED = (4, 8)  # numbers of GPUs that are not fitted
KINDS = ("h100", "h200")
OTHERS = "h200"  # whose files stand in for missing ones
BLUE = ("#123a5c", "#1b5a8c", "#2f7ebc", "#6aa9d8", "#9cc4e4", "#c3dcf0", "#dfecf7")  # one for each term
ORANGE = ("#7a3c07", "#b35a10", "#e0812c", "#ec9f5c", "#f3bd8d", "#f8d6b8", "#fcebdd")
WIDTH, NAMES, BARS, ROW = 900, 90, 480, 34  # pixels: the picture, the names' column, the longest bar, a row
FILES = {"forward": "forward", "vae": "vae", "video": "whole-video-random"}  # the beginnings of their names
MEASURED_BY = (
    "for example by `python benchmarks/forward.py --ranks 2 --kernels fa3 --profile`, "
    "`python benchmarks/vae.py --ranks 2` or "
    "`python benchmarks/whole_video.py --random --steps 2 --size 1280x720 --num-gpus 2`"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with benchmarks/results and docs")
    root = parser.parse_args().root
    document = projection(root / RESULTS)
    (root / OWN).write_text(json.dumps(document, indent=1) + "\n")
    (root / "docs/projection.svg").write_text(picture(document))
    page = root / "docs/projection.md"
    page.write_text(with_block(page.read_text(), "tables", tables(document)))
    print(json.dumps(document))


@dataclass(frozen=True)
class Fitted:
    """Holds the fitted model, the files of its fit, and the files of more GPUs that check it.

    The keys say what a file measured, such as "forward" or "vae".
    """

    kind: str
    model: CostModel
    fitted_on: dict[str, Path]
    checked_on: dict[int, dict[str, Path]]  # by the number of GPUs, 4 and 8
    video: dict[str, Any]  # the whole videos on two GPUs
    checks: dict[int, list[dict[str, Any]]]  # by the number of GPUs: 2, 4 and 8

    def error_on(self, number: int) -> float | None:
        """Returns the last check's error, which is a whole video's if one was measured; None without a check."""
        return self.checks[number][-1]["error"] if self.checks[number] else None


def fitted(results: Path) -> Fitted:
    """Fits the model on the files of a folder, and checks it on those of four GPUs and of eight."""
    kind = next((kind for number in reversed(CHECKED) for kind in KINDS if _files_of(results, number, kind)), OTHERS)
    files = _files_of_fit(results, kind)
    checked_on = {number: _files_of(results, number, kind) for number in CHECKED}
    every = {*files.values(), *(file for found in checked_on.values() for file in found.values())}
    read = {file: json.loads(file.read_text()) for file in every}
    video = read[files["video"]]
    try:
        model = fit(read[files["forward"]], read[files["profile"]], read[files["vae"]], video)
        found = {2: checks(model, video=video) if kind in files["video"].stem else []}  # another kind shows nothing
        for number, by_role in checked_on.items():
            found[number] = checks(model, **{role: read[file] for role, file in by_role.items()})
        return Fitted(kind, model, files, checked_on, video, found)
    except KeyError as missing:
        names = ", ".join(sorted(file.name for file in read))
        raise SystemExit(f"one of {names} lacks {missing}: measure it again, {MEASURED_BY}") from None


def projection(results: Path) -> dict[str, Any]:
    """Returns the fit, the projected videos on each number of GPUs, and the checks."""
    found = fitted(results)
    tokens = WholeVideo.read(found.video).tokens
    videos = {str(number): found.model.video(tokens, mesh_of(number)) for number in GPUS}
    return {
        "gpu": found.kind,
        "size": found.video["size"],
        "steps": STEPS,
        "fitted_on": {role: file.name for role, file in found.fitted_on.items()},
        "checked_on": {
            str(number): {role: file.name for role, file in files.items()} for number, files in found.checked_on.items()
        },
        "fit": _rounded(vars(found.model)),
        "videos": {number: _rounded({**terms, "total": sum(terms.values())}) for number, terms in videos.items()},
        **{f"checks_on_{number}": of_number for number, of_number in found.checks.items()},
        **{f"error_on_{number}": found.error_on(number) for number in CHECKED},
    }


def _files_of(results: Path, number: int, kind: str) -> dict[str, Path]:
    """Returns the files of so many GPUs of this kind that are there, by what each one measured."""
    files = {role: results / f"{name}-{number}x{kind}.json" for role, name in FILES.items()}
    return {role: file for role, file in files.items() if file.exists()}


def _files_of_fit(results: Path, kind: str) -> dict[str, Path]:
    def first(*names: str) -> Path:
        found = [results / f"{name}.json" for name in names if (results / f"{name}.json").exists()]
        if not found:
            raise SystemExit(
                f"{results}: none of {', '.join(dict.fromkeys(names))} is there: measure it, {MEASURED_BY}"
            )
        return found[0]

    forward = first(*(f"forward-{number}x{kind}" for number in (4, 2, 8)), f"forward-2x{OTHERS}")
    has_profile = bool(json.loads(forward.read_text()).get("profiles"))
    return {
        "forward": forward,
        "profile": forward if has_profile else first(f"forward-{kind}", f"forward-{OTHERS}"),
        "vae": first(f"vae-2x{kind}", f"vae-2x{OTHERS}"),
        "video": first(f"whole-video-random-2x{kind}", f"whole-video-random-2x{OTHERS}"),
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if hasattr(values, "__dict__"):
        return _rounded(vars(values))
    return values if isinstance(values, int) else float(f"{values:.6g}")


def tables(document: dict[str, Any]) -> list[str]:
    """Returns the lines of both tables of the page, and of the declaration of their figures.

    The tables are the projected seconds of each term of the model, and the checks.
    """
    figures: dict[str, str] = {}

    def cell(value: float, path: str, form: str = "{:.1f} s") -> str:
        figures.setdefault(form.format(value), path)
        return form.format(value)

    width, height, frames = document["size"]
    columns = (*TERMS, "total")
    sizes = f"{width}x{height}, {frames} frames, {document['steps']} steps, {document['gpu'].upper()}, a new prompt"
    lines = [f"Seconds of a command that makes one video ({sizes}):", ""]
    lines += ["| GPUs | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for number, video in document["videos"].items():
        lines.append(f"| {number} | " + " | ".join(cell(video[c], f"videos/{number}/{c}") for c in columns) + " |")
    files = ", ".join(f"`{RESULTS / name}`" for name in dict.fromkeys(document["fitted_on"].values()))
    lines += ["", f"Fitted on {files}.", "", "| checked | measured | projected | error |", "|---|---|---|---|"]
    for of in (f"checks_on_{number}" for number in (2, *CHECKED)):
        for place, check in enumerate(document[of]):
            path = f"{of}/{place}"
            values = [cell(check[name], f"{path}/{name}", "{:.2f} s") for name in ("measured_s", "projected_s")]
            sign = "0 - " if check["error"] < 0 else ""
            error = cell(abs(check["error"]) * 100, f"{sign}{path}/error * 100", "{:.1f} %")
            lines.append(f"| {check['what']} | {' | '.join(values)} | {error} {'less' if sign else 'more'} |")
    by = {
        number: ", ".join(f"`{RESULTS / name}`" for name in files.values())
        for number, files in document["checked_on"].items()
    }
    said = [f"Checked on {number} by {files}." for number, files in by.items() if files]
    if not by["4"]:
        said.insert(0, f"**The projection is {NOT_CHECKED}**: no file of four GPUs yet.")
    return [*lines, "", " ".join(said), *declaration(OWN, figures)]


def picture(document: dict[str, Any]) -> str:
    """Returns an SVG picture with a bar for each number of GPUs; a bar's parts are the terms of the model.

    The bar of 8 GPUs has other colours, because it is only projected. If a whole video was measured on 4 or 8 GPUs, a
    black line on the bar is at its seconds.
    """
    measured = {str(number): _whole_video_s(document, number) for number in CHECKED}
    longest = max(*(video["total"] for video in document["videos"].values()), *filter(None, measured.values()))
    width, height, frames = document["size"]
    title = f"a video of {width}x{height}, {frames} frames, {document['steps']} steps, {document['gpu'].upper()}"
    parts = [f'<text x="16" y="24" font-weight="bold">{title}: fitted on 1 and 2 GPUs, projected to 8</text>']
    for place, name in enumerate(TERMS):
        x = 16 + 120 * place
        parts.append(f'<rect x="{x}" y="38" width="14" height="14" fill="{BLUE[place]}"/>')
        parts.append(f'<rect x="{x + 14}" y="38" width="14" height="14" fill="{ORANGE[place]}"/>')
        parts.append(f'<text x="{x + 34}" y="50">{name}</text>')
    y = 66
    for number, video in document["videos"].items():
        parts += _bar(number, video, _said(number, document), BARS / longest, y, measured.get(number))
        y += ROW
    height_px = y + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height_px}" font-family="sans-serif" '
        'font-size="14">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height_px}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _whole_video_s(document: dict[str, Any], number: int) -> float | None:
    checks_of = document[f"checks_on_{number}"]
    return next((check["measured_s"] for check in checks_of if check["what"].startswith("a whole video")), None)


def _bar(number: str, video: dict[str, float], said: str, scale: float, y: int, measured_s: float | None) -> list[str]:
    colours, x = ORANGE if number == "8" else BLUE, float(NAMES)
    parts = [f'<text x="{NAMES - 10}" y="{y + 18}" text-anchor="end">{number} GPU{"s" * (number != "1")}</text>']
    for name, colour in zip(TERMS, colours, strict=True):
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{video[name] * scale:.1f}" height="26" fill="{colour}"/>')
        x += video[name] * scale
    if measured_s:
        at = NAMES + measured_s * scale
        parts.append(f'<rect x="{at - 1:.1f}" y="{y - 3}" width="2" height="32" fill="black"/>')
        x = max(x, at)
    return [*parts, f'<text x="{x + 8:.1f}" y="{y + 18}">{video["total"]:.0f} s, {said}</text>']


def _said(number: str, document: dict[str, Any]) -> str:
    """Returns what is known of the projection for a number of GPUs."""
    if number == "2" and document["checks_on_2"]:
        return f"fitted; {document['checks_on_2'][-1]['measured_s']:.0f} s with the steps that were measured"
    if number in ("1", "2"):
        return "fitted"
    if (error := document[f"error_on_{number}"]) is not None:
        return f"projected, {error:+.1%} to what was measured"
    error = document["error_on_4"]
    return f"projected, {NOT_CHECKED}" if error is None else f"projected, {error:+.1%} on 4 GPUs"


if __name__ == "__main__":
    main()
