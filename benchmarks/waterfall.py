"""Draws docs/waterfall.svg from the JSON files of benchmarks/results: what each step saves, and whether it is lossless.

    python benchmarks/waterfall.py                      # writes docs/waterfall.svg
    python benchmarks/waterfall.py --output OTHER.svg

Each group of bars was measured on one kind of GPU, and the first bar of a group is 100 %. Bars of different groups
cannot be compared.
A test draws the picture again and compares the bytes, so that it follows the JSON files.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
Kind = Literal["reference", "lossless", "lossy"]
COLOURS: dict[Kind, str] = {"reference": "#9aa0a6", "lossless": "#2f7ebc", "lossy": "#e0812c"}
WIDTH, NAMES, BARS, ROW = 900, 350, 430, 26  # pixels: the picture, the names' column, the longest bar, a row


@dataclass(frozen=True)
class Bar:
    """Describes one bar: a configuration, its measured seconds, and whether it is lossless."""

    name: str
    seconds: float
    kind: Kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/waterfall.svg")
    options = parser.parse_args()
    options.output.write_text(picture())


def picture() -> str:
    """Returns the picture as the text of an SVG file."""
    y, parts = 34, _legend()
    for title, bars in groups().items():
        parts.append(f'<text x="16" y="{y + 18}" font-weight="bold">{escape(title)}</text>')
        y += ROW + 4
        for bar in bars:
            parts += _row(bar, bar.seconds / bars[0].seconds, y)
            y += ROW
        y += 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="14">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>"]) + "\n"


def groups() -> dict[str, list[Bar]]:
    """Returns {title: bars of the group}; the other bars of a group are drawn relative to its first bar."""
    one, two = _ways("forward-h100"), _ways("forward-2xh100")
    eight_bits, skipping = _ways("quantized-h200"), _read("magcache-h200")["seconds"]
    attention = _ways("lossy-h200")
    return {
        "H100: a forward of one expert, 1280x720, 81 frames": [
            _bar("diffusers, eager, cuDNN attention", one["diffusers eager cudnn"], "reference"),
            _bar("diffusers, compiled", one["diffusers compiled cudnn"], "reference"),
            _bar("wanfast, compiled, the same attention", one["wanfast compiled cudnn"], "lossless"),
            _bar("+ FlashAttention-3", one["wanfast compiled fa3"], "lossless"),
            _bar("+ a second H100 (--ulysses 2)", two["ulysses 2"], "lossless"),
        ],
        "H200: the same forward with experts in 8 bits": [
            _bar("wanfast, bf16", eight_bits["bf16"], "lossless"),
            _bar("--quantize int8-dynamic", eight_bits["int8-dynamic"], "lossy"),
            _bar("--quantize fp8-rowwise", eight_bits["fp8-rowwise"], "lossy"),
        ],
        "H200: the same forward with lossy attention in all layers": [
            _bar("wanfast, bf16", attention["bf16, compiled"], "lossless"),
            _bar("--attention fa3-fp8", attention["bf16 linears, fp8"], "lossy"),
            _bar("the same and --quantize fp8-rowwise", attention["fp8 linears, fp8"], "lossy"),
            _bar("--attention sparse --density 0.35", attention["bf16 linears, sparse"], "lossy"),
            _bar("the same and --quantize fp8-rowwise", attention["fp8 linears, sparse"], "lossy"),
        ],
        "H200: 40 steps at 832x464, 81 frames": [
            Bar("wanfast, all 80 forwards", skipping["full"][0], "lossless"),
            Bar("--magcache E012K2R20: 58 of 80", skipping["cached"][0], "lossy"),
        ],
    }


def _bar(name: str, way: dict[str, Any], kind: Kind) -> Bar:
    return Bar(name, way["ms"] / 1000, kind)


def _ways(name: str) -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = _read(name)["ways"]
    return ways


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return document


def _legend() -> list[str]:
    parts = []
    for number, (kind, colour) in enumerate(COLOURS.items()):
        x = NAMES + 120 * number
        parts.append(f'<rect x="{x}" y="12" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="24">{kind}</text>')
    return parts


def _row(bar: Bar, share: float, y: int) -> list[str]:
    said = f"{bar.seconds:.1f} s" if bar.seconds >= 100 else f"{bar.seconds:.2f} s"
    return [
        f'<text x="{NAMES - 10}" y="{y + 16}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect x="{NAMES}" y="{y + 3}" width="{BARS * share:.1f}" height="18" fill="{COLOURS[bar.kind]}"/>',
        f'<text x="{NAMES + BARS * share + 8:.1f}" y="{y + 16}">{said}, {share:.0%}</text>',
    ]


if __name__ == "__main__":
    main()
