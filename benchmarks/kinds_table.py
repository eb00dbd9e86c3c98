"""Writes the table of last images and joined clips in docs/kinds.md from the result of `make tiny-kinds`.

    python benchmarks/kinds_table.py      # reads benchmarks/results/tiny-kinds.json

Without this file, the page says that nothing was measured yet. `make tiny-tables` writes the table too, and a test
compares it with the page.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from page_block import declaration, with_block
from projection import RESULTS, ROOT

OWN, PAGE, BLOCK = RESULTS / "tiny-kinds.json", "docs/kinds.md", "last images and joined clips"
MOVERS = {"shape": "shapes", "camera": "photographs"}
SMOOTH = "videos whose seams are below their own 95th percentile"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with docs and benchmarks/results")
    root = parser.parse_args().root
    page = root / PAGE
    page.write_text(with_block(page.read_text(), BLOCK, lines(root)))


def lines(root: Path) -> list[str]:
    """Returns the lines of the table and of the declaration of its figures.

    If the JSON file of the result is missing, returns lines that say that nothing was measured.
    """
    if not (root / OWN).exists():
        return ["Not measured yet: `make tiny-kinds` writes the figures here."]
    document = json.loads((root / OWN).read_text())
    figures: dict[str, str] = {}
    movers = {mover: name for mover, name in MOVERS.items() if mover in document["chains"]}
    made = [f"| on held-out pairs[^kinds] | {' | '.join(movers.values())} |", "|---" * (len(movers) + 1) + "|"]
    for name, of in _rows(document["clips"]).items():
        cells = [_cell(document, of.replace("MOVER", mover), figures) for mover in movers]
        made.append(f"| {name} | {' | '.join(cells)} |")
        if name == SMOOTH:
            by_motion = [_by_motion(document["chains"][mover]["seams_by_motion"]) for mover in movers]
            made.append(f"| the same by motion | {' | '.join(by_motion)} |")
    device, version = document["hardware"]["device"], document["versions"]["torch"]
    note = f"[^kinds]: `make tiny-kinds`: {device}, torch {version}; `{OWN}` ({document['commit']})."
    return [*made, "", note, "", *declaration(OWN, figures)]


def _rows(clips: int) -> dict[str, str]:
    """Returns {the name of a row: its cell}, in which {PATH:FORM} stands for a figure of the result."""
    return {
        "last image given: PSNR of the last frame against it, mean and least": (
            "{between/MOVER/given/last_frame_psnr:.1f dB}, {between/MOVER/given/last_frame_psnr_least:.1f dB}"
        ),
        "videos that reach it (25 dB or more)": _share("between/MOVER/given/last_frame_reached"),
        "the same without the last image": _share("between/MOVER/not_given/last_frame_reached"),
        f"{clips} clips joined: mean difference of neighbouring frames at the seams, of 255": (
            "{chains/MOVER/difference/seams:.3f}"
        ),
        "the 95th percentile of the same inside the clips": "{chains/MOVER/difference/inside_95%:.3f}",
        "still videos: the mean at the seams, and the 95th percentile inside the clips": (
            "{chains/MOVER/seams_by_motion/still/seams:.3f}, {chains/MOVER/seams_by_motion/still/inside_95%:.3f}"
        ),
        "still videos: the difference of a shared frame to itself, encoded and decoded by the VAE": (
            "{chains/MOVER/seams_by_motion/still/round_trip:.3f}"
        ),
        SMOOTH: _share("chains/MOVER/smooth_videos"),
        "seams over which the motion goes on": _share("chains/MOVER/motion_goes_on"),
        "first and last clips that show what the prompt asks for": (
            f"{_share('chains/MOVER/prompt_following/0')}, {_share(f'chains/MOVER/prompt_following/{clips - 1}')}"
        ),
        **{
            f"drift of the {what} of red, green and blue in clip {clip + 2}, of 255": ", ".join(
                f"{{chains/MOVER/drift/{clip}/{key}/{channel}:+.2f}}" for channel in range(3)
            )
            for key, what in (("mean", "mean"), ("deviation", "standard deviation"))
            for clip in range(clips - 1)
        },
    }


def _by_motion(seams: dict[str, Any]) -> str:
    """Returns how many videos of each motion have smooth seams, such as `circle 11 of 11, still 0 of 3`."""
    return ", ".join("{} {} of {}".format(name, *of["smooth_videos"]) for name, of in seams.items())


def _share(path: str) -> str:
    """Returns the form of a share, such as 24 of 25."""
    return f"{{{path}/right:d}} of {{{path}/of:d}}"


def _cell(document: dict[str, Any], form: str, figures: dict[str, str]) -> str:
    """Returns a cell with its figures, or a dash if the result has none.

    Figures with units or three decimals are added to `figures`: {figure: its path}.
    """

    def written(found: re.Match[str]) -> str:
        path, style, unit = found.groups()
        number = _at(document, path)
        figure = "—" if number is None else f"{number:{style}}{unit}"
        if unit or style == ".3f":
            figures.setdefault(figure, path)
        return figure

    cell = re.sub(r"\{([^:}]+):([^} ]+)( dB|)\}", written, form)
    return "—" if "—" in cell else cell


def _at(document: Any, path: str) -> Any:
    """Returns what the result has at a path; None if nothing was counted there."""
    for key in path.split("/"):
        document = document and (document[int(key)] if isinstance(document, list) else document.get(key))
    return document


if __name__ == "__main__":
    main()
