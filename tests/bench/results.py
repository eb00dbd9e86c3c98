"""Copies results of benchmarks into an empty folder, and imports the programs of benchmarks/ that read them."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

from wanfast.runtime.facts.model_spec import A14B

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
OF_TWO = ("forward-2xh200", "forward-h200", "vae-2xh200", "whole-video-random-2xh200")


def program(name: str) -> Any:
    """Imports a file of benchmarks/ as it imports its neighbours."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def of_published_size(on: str = "4 x NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    """Returns what README's table wants of a report of `wanfast bench`; `on`: its machine."""
    clips = [{"prompt": "a", "video_size": "1280x720"}]
    return {"model": A14B.name, "machine": on, "size": "1280x720", "frames": 81, "steps": 40, "clips": clips}


def results_of_two(root: Path) -> Path:
    """Returns a new folder with the files of one GPU and two, below `root`."""
    folder = root / "benchmarks/results"
    folder.mkdir(parents=True)
    for name in OF_TWO:
        shutil.copy(ROOT / f"benchmarks/results/{name}.json", folder)
    return folder
