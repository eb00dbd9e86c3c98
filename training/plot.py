"""Plots the losses of every stage: `python -m training.plot --folder runs/tiny` writes FOLDER/losses.png.

A stage takes batches of several shapes in turn. Their losses differ, so that each shape has a line of its own. All logs
whose names begin with a stage's name are drawn, so that an expert that learns alone, or further, has a log of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STAGES = {
    "vae-short": ("psnr",),
    "vae-long": ("psnr",),
    "vae-decoder": ("psnr",),
    "experts": ("high", "low"),
    "lora": ("psnr",),
}


def lines(log: Path, terms: tuple[str, ...]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns {term of the loss and shape of the batch: (steps, values)}; a moving average smooths the values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for term in (term for term in terms if term in row):  # an expert that does not learn has no loss
            steps, values = found.setdefault(f"{term} {'x'.join(map(str, row['batch']))}", ([], []))
            before = values[-1] if values else row[term]
            steps.append(row["step"])
            values.append(0.8 * before + 0.2 * row[term])
    return found


def plot(folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [(name, log) for name in STAGES for log in sorted(folder.glob(f"{name}*.jsonl"))]
    figure, axes = pyplot.subplots(len(logs), figsize=(8, 3 * len(logs)), layout="constrained", squeeze=False)
    panel: Any
    for panel, (name, log) in zip(axes[:, 0], logs, strict=True):
        for label, (steps, values) in lines(log, STAGES[name]).items():
            panel.plot(steps, values, label=label)
        panel.set(title=log.stem, xlabel="step", ylabel=" or ".join(STAGES[name]))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    figure.savefig(folder / "losses.png", dpi=110)
    return folder / "losses.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the folder of `python -m training`")
    print(plot(parser.parse_args().folder))
