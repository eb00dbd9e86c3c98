"""Makes all tables, plots, curves and pictures again that were measured with other weights of the tiny model.

    python benchmarks/tiny_tables.py              # makes all tables of other weights, then writes the pages
    python benchmarks/tiny_tables.py tiny-preset  # makes only this table, even if it belongs to the present weights
    python benchmarks/tiny_tables.py --pages      # only writes the pages, from the present JSON files

`make tiny-tables` runs this program. A "table" is what one `make` target measures or draws; training/README.md lists
all of them. `benchmarks/results/tiny-tables.json` holds, for each table, the weights with which it was made. So an
interrupted run continues with the next table. A table that needs a GPU is made only if its name is given. Tables of the
distilled pair of LoRAs are left out while the pair does not ship. A test fails while a table belongs to other weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from page_block import with_block
from projection import RESULTS, ROOT
from tiny_pages import written

from wanfast.runtime.machine.packages import commit
from wanfast.runtime.store import model_files

OWN, LIST = RESULTS / "tiny-tables.json", "training/README.md"


@dataclass(frozen=True)
class Table:
    """Describes what `make NAME` makes: its files, the expected minutes, and whether it needs a GPU."""

    files: tuple[str, ...]
    minutes: int  # expected, on two cores or on the GPU
    needs_gpu: bool = False
    pair: Literal["", "shown", "needed"] = ""  # whether it also judges the distilled pair of LoRAs


PAIR = model_files.TINY / "loras/lightning-4"
TABLES = {  # in this order, because skipping needs the curve
    "tiny-preset": Table(("wanfast/assets/magcache/tiny.json",), 1),
    "tiny-examples": Table(("docs/star.png", "docs/cat.png"), 1),
    "tiny-quality": Table((f"{RESULTS}/tiny-quality.json", f"{RESULTS}/tiny-quality.png"), 8),
    "tiny-quality-int8-weight-only": Table((f"{RESULTS}/tiny-quality-int8-weight-only.json",), 8),
    "tiny-quality-int8-dynamic": Table((f"{RESULTS}/tiny-quality-int8-dynamic.json",), 5),
    "tiny-quality-fp8-rowwise": Table((f"{RESULTS}/tiny-quality-fp8-rowwise.json",), 8),
    "tiny-magcache": Table((f"{RESULTS}/tiny-magcache.json", f"{RESULTS}/tiny-magcache.png"), 16, pair="shown"),
    "tiny-magcache-extrapolated": Table((f"{RESULTS}/tiny-magcache-extrapolated.json",), 3),
    "tiny-lossy": Table((f"{RESULTS}/tiny-lossy.json",), 1),
    "tiny-kinds": Table((f"{RESULTS}/tiny-kinds.json",), 5),
    "tiny-attention": Table((f"{RESULTS}/tiny-attention.json", f"{RESULTS}/tiny-attention.png"), 15),
    "tiny-few-steps": Table((f"{RESULTS}/tiny-few-steps.json",), 12, pair="needed"),
    "tiny-bench": Table(("docs/bench.png",), 3),
    "tiny-quality-256": Table(
        (f"{RESULTS}/tiny-quality-256.json", f"{RESULTS}/tiny-quality-256.png"), 5, needs_gpu=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the table to make: one of {', '.join(TABLES)}")
    parser.add_argument("--pages", action="store_true", help="write the pages, but make no table")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in TABLES]:
        parser.error(f"NAME {unknown[0]!r}: use one of {', '.join(TABLES)}")
    if options.pages and options.names:
        parser.error("--pages makes no table: drop --pages, or drop the names")
    for name in () if options.pages or options.names else left_out():
        print(f"{name}: left out, because the tiny model has no loras/{PAIR.name} yet", flush=True)
    code = commit()  # before a table changes the tree
    for name in () if options.pages else options.names or stale(made(ROOT), weights()):
        make(name, code)
    for page, text in pages(ROOT).items():
        (ROOT / page).write_text(text)
    print(f"tables that belong to other weights: {', '.join(stale(made(ROOT), weights())) or 'none'}")


def weights() -> str:
    """Returns the identity of the tiny model's weights and tokenizer."""
    return identity(model_files.locate("tiny", "artifacts").fingerprints)


def identity(parts: dict[str, str]) -> str:
    """Returns the identity of weights with these fingerprints; some results hold the fingerprints themselves."""
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
    """Returns {table: {"weights", "commit", "minutes"}}, which says when each table was made."""
    document: dict[str, Any] = json.loads((root / OWN).read_text())
    return document


def stale(known: dict[str, Any], present: str) -> list[str]:
    """Returns the names of the tables that belong to other weights than `present`, or to another pair of LoRAs.

    Tables that need a GPU, or a pair that does not ship, are left out.
    """
    return [
        name
        for name, table in TABLES.items()
        if not table.needs_gpu
        and name not in left_out()
        and (name not in known or known[name]["weights"] != judged_by(name, present))
    ]


def make(name: str, code: str | None) -> None:
    """Makes a table with the programs of this Python's environment, and stores the weights and the commit `code`.

    The results of the table name this commit too. Otherwise they would be `-dirty`, because tables that were made
    before them changed the tree.
    """
    present, started = judged_by(name, weights()), time.perf_counter()
    print(f"{name}: about {TABLES[name].minutes} min", flush=True)
    programs = (f"BIN={Path(sys.executable).parent}", "-o", ".venv/dev", "-o", ".venv/runtime")
    environment = os.environ | ({"WANFAST_COMMIT": code} if code else {})
    if failed := subprocess.run(["make", name, *programs], cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"`make {name}` ended with {failed}: fix what it printed; `make tiny-tables` continues here")
    minutes = round((time.perf_counter() - started) / 60, 1)
    known = made(ROOT) | {name: {"weights": present, "commit": code, "minutes": minutes}}
    (ROOT / OWN).write_text(json.dumps(known, indent=1) + "\n")


def pages(root: Path) -> dict[str, str]:
    """Returns {page: its text}, for each page that shows measurements of the tiny model or the list of tables."""
    return {**written(root), LIST: with_block((root / LIST).read_text(), "tables", listed())}


def listed() -> list[str]:
    """Returns the lines of the list of the tables."""
    rows = ["| command | files | expected minutes |", "|---|---|---|"]
    for name, table in TABLES.items():
        files = ", ".join(f"`{file}`" for file in table.files)
        needs = ", on a GPU" * table.needs_gpu + ", with the LoRA pair" * (table.pair == "needed")
        rows.append(f"| `make {name}` | {files} | {table.minutes}{needs} |")
    minutes = sum(table.minutes for name, table in TABLES.items() if not table.needs_gpu and name not in left_out())
    return [*rows, "", f"Those that need no GPU take about {minutes} minutes on two cores."]


if __name__ == "__main__":
    main()
