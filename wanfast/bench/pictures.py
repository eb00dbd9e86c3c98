"""Draws the pictures of a report: the measured and the published seconds, and the quality over the seconds.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, PUBLISHED, FLOOR = "#2f7ebc", "#9aa0a6", "#e0812c"


def draw_waterfall(report: dict[str, Any], file: Path) -> None:
    """Draws two bar charts side by side, with one bar for each recipe in each chart.

    The left bars show the seconds that were measured here, divided into encoding, denoising and decoding. The right
    bars show the published seconds.
    """
    from matplotlib.figure import Figure

    rows = report["rows"][::-1]  # the first is drawn on top
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(rows)), layout="constrained")
    ours, published = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = [_name(row) for row in rows]
    left = [0.0] * len(rows)
    for stage, shade in (("encode", "#9cc4e4"), ("denoise", OURS), ("decode", "#1b4b73")):
        widths = [row["seconds"].get(stage, {"median": 0.0})["median"] for row in rows]
        ours.barh(names, widths, left=left, color=shade, label=stage)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        ratio = f", {row['ratio']:.2f}" if row["ratio"] else ""
        ratio += " (unclear)" if row["ratio_unclear"] else ""
        ratio += ", estimated" if row["estimated"] else ""
        text = f" {row['video_s']['median']:.1f} s{ratio}" if row["video_s"] else f" {row['status']}"
        ours.text(left[place], place, text, va="center", fontsize="small")
    ours.set_title(f"here: {report['model']}, {report['machine']}")
    ours.set(xlabel="seconds of a video", xlim=(0, 1.3 * max(left) or 1))
    ours.legend(fontsize="small", loc="lower right")
    bars = published.barh(names, [row["published_s"] or 0 for row in rows], color=PUBLISHED)
    published.bar_label(bars, [f"{row['published_s']} s" if row["published_s"] else "" for row in rows], padding=3)
    published.set(title="published: A14B, 8 x H100", xlabel="seconds of a video", xlim=(0, 320))
    figure.supxlabel(_note(rows), fontsize="small")
    figure.savefig(file, dpi=110, format="png")


def draw_quality(report: dict[str, Any], file: Path) -> None:
    """Draws a point for each recipe: the seconds of a video (x), and the PSNR against the first recipe (y).

    If a recipe's videos are identical to those of the first recipe, the PSNR is infinite, and the point lies near the
    upper edge. Two dashed lines compare the first recipe with itself. One is the PSNR of a second run with the same
    seed, and the other is the PSNR of a run with another seed. If a PSNR was not measured or is infinite, its line is
    left out.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["quality"]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    finite = [row["quality"]["psnr"] for row in rows if row["quality"]["psnr"] is not None]
    floor = {name: of["psnr"] for name, of in report["noise_floor"].items() if isinstance(of, dict)}
    finite += [value for value in floor.values() if value is not None]
    top = max(finite, default=60.0) + 8
    for row in rows:
        quality = row["quality"]
        place = row["video_s"]["median"], top if quality["identical"] else quality["psnr"]
        axes.plot(*place, "^" if quality["identical"] else "o", color=OURS)
        name = f"{_name(row)}{': identical, ∞ dB' if quality['identical'] else ''}"
        axes.annotate(name, place, (5, 4), textcoords="offset points", fontsize="small")
    for name, value in floor.items():
        if value is not None:
            axes.axhline(value, color=FLOOR, linestyle="--", label=f"{report['base']}, {name}")
            axes.legend(fontsize="small", loc="lower right")
    axes.set_title(f"{report['model']}, {report['machine']}")
    axes.set(xlabel="seconds of a video", ylabel=f"PSNR to {report['base']} in dB", ylim=(None, top + 5))
    axes.margins(x=0.25)
    figure.supxlabel(_note(rows), fontsize="small")
    figure.savefig(file, dpi=110, format="png")


def _name(row: dict[str, Any]) -> str:
    """Returns the recipe of a row, with a star if other options than the recipe's were measured."""
    return f"{row['recipe']}{'*' if _is_changed(row) else ''}"


def _note(rows: list[dict[str, Any]]) -> str:
    """Returns what the star of some names means."""
    changes = dict.fromkeys(" ".join(row["overridden"]) for row in rows if _is_changed(row))
    return f"* but with {'; '.join(changes)}" if changes else ""


def _is_changed(row: dict[str, Any]) -> bool:
    return row["status"] == "measured" and bool(row["overridden"])
