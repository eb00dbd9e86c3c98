"""Makes again what was judged on the tiny model's weights: tables, plots, a curve and pictures. `make tiny-tables`.

    python benchmarks/tiny_tables.py              # makes what is of other weights, then writes the pages
    python benchmarks/tiny_tables.py tiny-preset  # makes only this, even if it is of these weights
    python benchmarks/tiny_tables.py --pages      # only writes the pages, from the files that are there

training/README.md has the list. `benchmarks/results/tiny-tables.json` holds the weights of each table, so that an
interrupted run continues with the next one. There, "not_made" says why a table was not made for these weights: they do
not know what it judges. What needs a GPU is made only if it is named. What judges the distilled pair of LoRAs is left
out while the pair does not ship. A test fails while a table belongs to other weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from page_block import with_block
from projection import RESULTS, ROOT
from tiny_pages import OWN, written

from wanfast.runtime.machine.packages import commit
from wanfast.runtime.store import model_files

LIST = "training/README.md"


@dataclass(frozen=True)
class Table:
    """Says what `make NAME` makes, and how long this takes."""

    files: tuple[str, ...]
    minutes: int  # expected, on two cores or on the GPU
    needs_gpu: bool = False
    pair: Literal["", "shown", "needed"] = ""  # whether it also judges the distilled pair of LoRAs


PAIR = model_files.TINY / "loras/lightning-4"
TABLES = {  # in this order, because skipping needs the curve
    "tiny-preset": Table(("wanfast/assets/magcache/tiny.json",), 1),
    "tiny-examples": Table(("docs/star.png", "docs/cat.png"), 1),
    "tiny-quality": Table((f"{RESULTS}/tiny-quality.json", f"{RESULTS}/tiny-quality.png"), 20),
    "tiny-quality-int8-weight-only": Table((f"{RESULTS}/tiny-quality-int8-weight-only.json",), 12),
    "tiny-quality-int8-dynamic": Table((f"{RESULTS}/tiny-quality-int8-dynamic.json",), 22),
    "tiny-quality-fp8-rowwise": Table((f"{RESULTS}/tiny-quality-fp8-rowwise.json",), 12),
    "tiny-magcache": Table((f"{RESULTS}/tiny-magcache.json", f"{RESULTS}/tiny-magcache.png"), 50, pair="shown"),
    "tiny-magcache-extrapolated": Table((f"{RESULTS}/tiny-magcache-extrapolated.json",), 12),
    "tiny-lossy": Table((f"{RESULTS}/tiny-lossy.json",), 2),
    "tiny-kinds": Table((f"{RESULTS}/tiny-kinds.json",), 20),
    "tiny-attention": Table((f"{RESULTS}/tiny-attention.json", f"{RESULTS}/tiny-attention.png"), 20),
    "tiny-few-steps": Table((f"{RESULTS}/tiny-few-steps.json",), 12, pair="needed"),
    "tiny-bench": Table(("docs/bench.png",), 7),
    "tiny-quality-256": Table(
        (f"{RESULTS}/tiny-quality-256.json", f"{RESULTS}/tiny-quality-256.png"), 10, needs_gpu=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--pages", action="store_true", help="make no table, only write the pages")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in TABLES]:
        parser.error(f"NAME {unknown[0]!r}: use one of {', '.join(TABLES)}")
    if options.pages and options.names:
        parser.error("--pages makes no table: drop it, or drop the names")
    for name in () if options.pages or options.names else left_out():
        print(f"{name}: left out, because the tiny model has no loras/{PAIR.name} yet", flush=True)
    code = commit()  # before a table changes the tree
    for name in () if options.pages else options.names or stale(made(ROOT), weights()):
        make(name, code)
    for page, text in pages(ROOT).items():
        (ROOT / page).write_text(text)
    print(f"of other weights: {', '.join(stale(made(ROOT), weights())) or 'no table'}")


def weights() -> str:
    """Returns the identity of the tiny model's weights and tokenizer."""
    parts = model_files.locate("tiny", "artifacts").fingerprints
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def judged_by(name: str, present: str) -> str:
    """Returns the identity of what a table judges: the weights `present`, and the pair of LoRAs if the table shows it.

    Without a pair, this is the identity of the weights.
    """
    files = sorted(PAIR.glob("*.safetensors")) if TABLES[name].pair else []
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(json.dumps([present, *digests]).encode()).hexdigest()[:12] if files else present


def left_out() -> list[str]:
    """Returns the names of the tables that need the pair of LoRAs, if it does not ship."""
    return [] if PAIR.is_dir() else [name for name, table in TABLES.items() if table.pair == "needed"]


def made(root: Path) -> dict[str, Any]:
    """Returns {table: its weights, and the commit and the minutes that it took, or why it was not made}."""
    document: dict[str, Any] = json.loads((root / OWN).read_text())
    return document


def stale(known: dict[str, Any], present: str) -> list[str]:
    """Returns the names of the tables that belong to other weights than those `present`, or to another pair of LoRAs.

    The tables that need a GPU, or a pair that does not ship, are left out.
    """
    return [
        name
        for name, table in TABLES.items()
        if not table.needs_gpu
        and name not in left_out()
        and (name not in known or known[name]["weights"] != judged_by(name, present))
    ]


def make(name: str, code: str | None) -> None:
    """Makes a table with the programs of this Python's environment, and stores the weights and the commit."""
    present, started = judged_by(name, weights()), time.perf_counter()
    print(f"{name}: about {TABLES[name].minutes} min", flush=True)
    programs = (f"BIN={Path(sys.executable).parent}", "-o", ".venv/dev", "-o", ".venv/runtime")
    if failed := subprocess.run(["make", name, *programs], cwd=ROOT).returncode:
        raise SystemExit(f"`make {name}` ended with {failed}: fix what it printed; `make tiny-tables` continues here")
    minutes = round((time.perf_counter() - started) / 60, 1)
    known = made(ROOT) | {name: {"weights": present, "commit": code, "minutes": minutes}}
    (ROOT / OWN).write_text(json.dumps(known, indent=1) + "\n")


def pages(root: Path) -> dict[str, str]:
    """Returns the text of each page that shows what was judged on these weights, and the list of the tables."""
    return {**written(root), LIST: with_block((root / LIST).read_text(), "tables", listed())}


def listed() -> list[str]:
    """Returns the lines of the list of the tables."""
    rows = ["| command | files | expected minutes |", "|---|---|---|"]
    for name, table in TABLES.items():
        files = ", ".join(f"`{file}`" for file in table.files)
        needs = ", on a GPU" * table.needs_gpu + ", with the LoRA pair" * (table.pair == "needed")
        rows.append(f"| `make {name}` | {files} | {table.minutes}{needs} |")
    minutes = sum(table.minutes for table in TABLES.values() if not table.needs_gpu)
    return [*rows, "", f"Those that need no GPU take about {minutes} minutes on two cores."]


if __name__ == "__main__":
    main()
