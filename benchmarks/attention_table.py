"""Writes the table of docs/sparse-attention.md from what `python -m wanfast.quality.attention` measured.

    python benchmarks/attention_table.py      # reads benchmarks/results/tiny-attention.json

`make tiny-tables` writes the table too, and a test compares it with the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from page_block import declaration, with_block
from projection import RESULTS, ROOT

OWN, PAGE, BLOCK = RESULTS / "tiny-attention.json", "docs/sparse-attention.md", "quality of lossy attention"
_COLUMNS = {  # {name: (of the table, digits, unit)}
    "mean_error": ("mean error", 3, ""),
    "largest_error": ("largest error", 3, ""),
    "psnr_dense": ("PSNR", 1, " dB"),
    "ssim_dense": ("SSIM", 4, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with docs/ and benchmarks/results")
    root = parser.parse_args().root
    made = lines(json.loads((root / OWN).read_text()))
    page = root / PAGE
    page.write_text(with_block(page.read_text(), BLOCK, made))
    print("\n".join(made))


def lines(document: dict[str, Any]) -> list[str]:
    """Returns the lines of the table, of its legend and of the declaration of its figures."""
    figures: dict[str, str] = {}

    def cell(row: int, name: str, digits: int, unit: str) -> str:
        value = document["rows"][row][name]
        if value is None:
            return "—"
        figures.setdefault(figure := f"{value:.{digits}f}{unit}", f"rows/{row}/{name}")
        return figure

    heads = [head for head, _, _ in _COLUMNS.values()]
    made = [f"| attention | density | {' | '.join(heads)} | prompts followed | gate |", "|---" * (4 + len(heads)) + "|"]
    for number, row in enumerate(document["rows"]):
        density = "—" if row["density"] is None else f"{row['density']:.2f}"
        cells = [cell(number, name, digits, unit) for name, (_, digits, unit) in _COLUMNS.items()]
        followed = "{right} of {of}".format(**row["prompt_following"])
        made.append(f"| {row['way']} | {density} | {' | '.join(cells)} | {followed} | {_gate(row['gate'])} |")
    return [*made, "", _legend(document), *declaration(OWN, figures)]


def _gate(met: dict[str, bool] | None) -> str:
    """Returns "holds", or the conditions that a way does not meet; dense attention has no gate."""
    if met is None:
        return "—"
    unmet = [name for name, is_met in met.items() if not is_met and name != "holds"]
    return f"not: {', '.join(unmet)}" if unmet else "holds"


def _legend(document: dict[str, Any]) -> str:
    """Returns how the table was made, and in how many pairs of videos the calibrated plans are better."""
    compared = [row["against_uniform"] for row in document["rows"] if "against_uniform" in row]
    better = [
        f"{sum(of_way[name] for of_way in compared)} with {what}"
        for name, what in (("lower_error", "a smaller error"), ("higher_psnr", "a higher PSNR"))
    ]
    return (
        f"{document['pairs']} pairs of image and prompt, {document['steps']} steps, {document['hardware']}, "
        f"torch {document['versions']['torch']} ({document['commit']}). Of {sum(way['pairs'] for way in compared)} "
        f"videos by a calibrated plan, so many beat the one by the uniform plan above it: {' and '.join(better)}."
    )


if __name__ == "__main__":
    main()
